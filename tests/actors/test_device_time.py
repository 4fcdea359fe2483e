"""The seconds of a pass are shared out, all of them, by what was computed for each command."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.device_time import with_device_time
from lorry.wire.actor_messages import Outcome
from lorry.wire.ids import FutureId


@given(st.lists(st.integers(0, 8192), max_size=20), st.floats(0, 100))
def test_all_of_it_is_somebodys_and_who_computed_more_has_more(tokens: list[int], pass_s: float) -> None:
    ends = {FutureId(str(i)): (Outcome(FutureId(str(i)), train_tokens=n), b"") for i, n in enumerate(tokens)}
    shared = with_device_time({**ends, FutureId("a save"): object()}, pass_s)
    assert shared.keys() == ends.keys(), "what is still written is told later"
    seconds = [outcome.device_s or 0.0 for outcome, _ in shared.values()]
    assert sum(seconds) == pytest.approx(pass_s if tokens else 0.0, abs=1e-5)
    assert [s for _, s in sorted(zip(tokens, seconds, strict=True))] == sorted(seconds)
