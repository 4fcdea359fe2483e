"""What ended is told in its run's order, once, and as soon as what is before it has ended."""

from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.outbox import Outbox
from lorry.wire.actor_messages import Outcome
from lorry.wire.ids import BatchId, FutureId

deeds = st.lists(st.tuples(st.sampled_from(["ends", "is written", "written"]), st.integers(0, 2)), max_size=60)


@given(deeds)
def test_a_runs_commands_are_told_in_order_and_none_waits_without_a_reason(deeds: list[tuple[str, int]]) -> None:
    outbox = Outbox()
    came: dict[str, list[str]] = {}
    told: dict[str, list[str]] = {}
    unwritten: dict[str, list[str]] = {}
    for deed, number in deeds:
        run = f"run {number}"
        if deed == "written":
            if waiting := unwritten.get(run):
                name = waiting.pop(len(waiting) // 2)
                due = outbox.ended(run, Outcome(FutureId(name)))
                told.setdefault(run, []).extend(outcome.future for _, outcome, _ in due)
        else:
            name = f"{run}:{len(came.setdefault(run, []))}"
            came[run].append(name)
            end = (Outcome(FutureId(name)), b"") if deed == "ends" else None
            if end is None:
                unwritten.setdefault(run, []).append(name)
            if not outbox.keeps(run, BatchId(1), FutureId(name), end):
                told.setdefault(run, []).append(name)
        first = came.get(run, [])
        waits = [first.index(name) for name in unwritten.get(run, [])]
        assert told.get(run, []) == first[: min(waits, default=len(first))]
