"""What is told of a run goes in order, once, and as soon as what is before it has ended."""

from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.outbox import End, Outbox, Written
from lorry.wire.actor_messages import Outcome, SnapshotTaken
from lorry.wire.ids import BatchId, FutureId

deeds = st.lists(
    st.tuples(st.sampled_from(["ends", "snapshot", "is written", "written"]), st.integers(0, 2)), max_size=60
)


def name_of(told: End | Written) -> str:
    if isinstance(told, End):
        return told.outcome.future
    assert isinstance(told, SnapshotTaken)
    return told.folder


@given(deeds)
def test_a_run_is_told_of_in_order_and_nothing_waits_without_a_reason(deeds: list[tuple[str, int]]) -> None:
    outbox = Outbox()
    came: dict[str, list[str]] = {}
    told: dict[str, list[str]] = {}
    unwritten: dict[str, list[str]] = {}
    for deed, number in deeds:
        run = f"run {number}"
        order, seen, waiting = (book.setdefault(run, []) for book in (came, told, unwritten))
        name = f"{run}:{len(order)}"
        if deed == "written":
            if waiting:
                due = outbox.ended(run, Outcome(FutureId(waiting.pop(len(waiting) // 2))))
                seen.extend(map(name_of, due))
        elif deed == "is written":
            order.append(name)
            waiting.append(name)
            outbox.wait_for(run, BatchId(1), FutureId(name))
        else:
            order.append(name)
            is_end = deed == "ends"
            one = End(BatchId(1), Outcome(FutureId(name)), b"") if is_end else SnapshotTaken(run, name, 1, 0.0)
            if not outbox.keeps(run, one):
                seen.append(name)
        first = min((order.index(name) for name in waiting), default=len(order))
        assert seen == order[:first]


def test_a_command_that_was_given_again_while_its_save_was_written_ends_twice() -> None:
    """The broker tells by the batch which of them counts."""
    outbox, outcome = Outbox(), Outcome(FutureId("save"))
    outbox.wait_for("run", BatchId(1), outcome.future)
    outbox.wait_for("run", BatchId(2), outcome.future)
    assert outbox.keeps("run", End(BatchId(2), Outcome(FutureId("behind it")), b""))
    assert [end.batch for end in outbox.ended("run", outcome) if isinstance(end, End)] == [1]
    assert [end.batch for end in outbox.ended("run", outcome) if isinstance(end, End)] == [2, 2]
