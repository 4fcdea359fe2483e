"""What waits is held in memory up to a limit; beyond it, the journal has it."""

from hypothesis import given
from hypothesis import strategies as st

from lorry.scheduler.open_commands import Payloads
from lorry.wire.ids import FutureId

STEPS = st.lists(st.tuples(st.booleans(), st.sampled_from("abcd"), st.binary(max_size=40)))


@given(STEPS, st.integers(0, 100))
def test_no_more_than_the_limit_is_held_and_what_is_held_is_right(
    steps: list[tuple[bool, str, bytes]], limit: int
) -> None:
    payloads = Payloads(limit)
    last: dict[str, bytes] = {}
    for holds, name, content in steps:
        if holds and name not in last:
            payloads.hold(FutureId(name), content)
            last[name] = content
        elif not holds:
            payloads.let_go(FutureId(name))
            last.pop(name, None)
        held = {n: payloads.get(FutureId(n)) for n in last}
        assert all(content in (None, last[n]) for n, content in held.items())
        assert sum(len(content or b"") for content in held.values()) <= limit
