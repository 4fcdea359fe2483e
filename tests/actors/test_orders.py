"""Which micro-batches may run in one pass: no run's order is broken, no budget exceeded, no suspect in company."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.orders import Train, runs_of, take_together
from lorry.wire.actor_messages import AdapterState, Item, MicroBatch
from lorry.wire.commands import PHASES, CommandKind
from lorry.wire.ids import BatchId, FutureId
from lorry.wire.types import LoraConfig

BUDGET = 100
KINDS: list[CommandKind] = ["forward", "forward_backward", "optim_step", "save_state", "load_state"]


def item(run: str, kind: CommandKind) -> Item:
    return Item(FutureId(f"{run}:0"), kind, AdapterState(run, LoraConfig(rank=4)))


def train(items: list[Item], tokens: int = 10, alone: bool = False) -> Train:
    return Train(MicroBatch(BatchId(0), "train", items, tokens, alone), [b""] * len(items))


micro_batches = st.builds(
    train,
    st.lists(st.builds(item, st.sampled_from("abc"), st.sampled_from(KINDS)), min_size=1, max_size=3).map(
        lambda items: sorted(items, key=lambda one: PHASES[one.kind])
    ),
    st.integers(1, 120),
    st.booleans(),
)


@given(st.lists(micro_batches, min_size=1, max_size=8))
def test_what_is_taken_together_keeps_every_runs_order(batches: list[Train]) -> None:
    waiting = deque(batches)
    taken = take_together(waiting, BUDGET)
    assert [*taken, *waiting] == batches and taken
    if len(taken) == 1:
        return
    assert sum(train.batch.tokens for train in taken) <= BUDGET
    assert not any(train.batch.alone for train in taken)
    reached: dict[str, int] = {}
    for batch in taken:
        first: dict[str, int] = {}
        for one in batch.batch.items:
            assert one.adapter is not None
            first.setdefault(one.adapter.key, PHASES[one.kind])
        for run, phase in first.items():
            assert phase >= reached.get(run, 0)
            assert phase != reached.get(run) or phase not in (1, 3), "a step or a load stands once in a pass"
        reached |= {one.adapter.key: PHASES[one.kind] for one in batch.batch.items if one.adapter}


def test_what_waits_and_fits_is_taken_at_once() -> None:
    waiting = deque(train([item(run, "forward_backward"), item(run, "optim_step")]) for run in "abcdefgh")
    taken = take_together(waiting, BUDGET)
    assert runs_of(taken) == set("abcdefgh") and not waiting


def test_a_backward_behind_its_runs_step_waits_for_the_next_pass() -> None:
    waiting = deque([train([item("a", "optim_step")]), train([item("a", "forward_backward")])])
    assert len(take_together(waiting, BUDGET)) == 1
