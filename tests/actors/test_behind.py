"""When a run is to be saved again."""

from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.adapters.behind import REPLAY_BYTES, Behind, SnapshotPolicy

POLICY = SnapshotPolicy(recovery_s=20, idle_s=60)
runs = st.dictionaries(
    st.sampled_from("abcd"),
    st.builds(Behind, st.floats(0, 30), st.integers(0, 2 * REPLAY_BYTES), st.floats(0, 1000)),
    max_size=4,
)


@given(runs, st.floats(0, 2000))
def test_whatever_could_cost_too_much_to_repeat_is_saved_and_the_dearest_first(
    runs: dict[str, Behind], now: float
) -> None:
    chosen = POLICY.most_due(runs, now)
    dear = [key for key, behind in runs.items() if behind.replay_s >= 10]
    if dear:
        assert chosen is not None and runs[chosen].replay_s == max(runs[key].replay_s for key in dear)
    elif chosen is not None:
        assert runs[chosen].replay_bytes >= REPLAY_BYTES or runs[chosen].changed_at + 60 <= now
    else:
        assert all(behind.replay_bytes < REPLAY_BYTES and behind.changed_at + 60 > now for behind in runs.values())


@given(runs, st.floats(0, 2000))
def test_what_is_due_at_a_moment_is_due_from_then_on(runs: dict[str, Behind], now: float) -> None:
    soonest = min((POLICY.due_at(behind) for behind in runs.values()), default=None)
    assert (POLICY.most_due(runs, now) is not None) == (soonest is not None and soonest <= now)


def test_what_a_snapshot_that_failed_did_not_cover_counts_with_what_came_since() -> None:
    assert Behind(1.0, 10, 7.0).after(Behind(2.0, 5, 3.0)) == Behind(3.0, 15, 7.0)
