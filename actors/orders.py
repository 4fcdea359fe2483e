"""What the actor's event loop orders of its compute thread, and which micro-batches may run together. Pure."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from ..wire.actor_messages import (
    CancelCommand,
    Item,
    MicroBatch,
    SnapshotFailed,
    SnapshotRecorded,
    SnapshotTaken,
)
from ..wire.commands import PHASES, REPLAYED_KINDS, phase_may_follow
from ..wire.ids import BatchId
from .adapters.samplers import Saved


@dataclass(frozen=True, slots=True)
class Train:
    """A micro-batch of training commands, with one payload an item."""

    batch: MicroBatch
    payloads: list[bytes]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request that is to join the decode loop."""

    batch: BatchId
    item: Item
    payload: bytes


@dataclass(frozen=True, slots=True)
class PixelsCame:
    """An image was decoded that a request waits for, or training."""


@dataclass(frozen=True, slots=True)
class Leave:
    """After all that was ordered before: save every run, and stop."""


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Order: TypeAlias = (
    Train
    | Sample
    | PixelsCame
    | CancelCommand
    | SnapshotTaken
    | SnapshotFailed
    | SnapshotRecorded
    | Saved
    | Leave
    | Stop
)


def take_together(waiting: deque[Train], token_budget: int) -> list[Train]:
    """Remove and return the first micro-batch, and those right behind it that may run in the same pass.

    Together they stay within `token_budget`, and no run's commands go back a phase: its order holds.
    """
    taken: list[Train] = []
    tokens = 0
    phases: dict[str, int] = {}
    while waiting:
        batch = waiting[0].batch
        tokens += batch.tokens
        apart = batch.alone or tokens > token_budget or not _phases_go_on(batch, phases)
        if taken and (apart or taken[0].batch.alone):
            break
        phases |= {item.adapter.key: PHASES[item.kind] for item in batch.items if item.adapter}
        taken.append(waiting.popleft())
    return taken


def runs_of(batches: Iterable[Train]) -> set[str]:
    return {item.adapter.key for train in batches for item in train.batch.items if item.adapter}


def changed_by(batches: Iterable[Train]) -> set[str]:
    """The runs whose state their commands may change."""
    items = (item for train in batches for item in train.batch.items if not _is_elsewhere(item))
    return {item.adapter.key for item in items if item.adapter and item.kind in REPLAYED_KINDS}


def _is_elsewhere(item: Item) -> bool:
    """It takes effect when its run's home gathers what was found."""
    return item.share is not None and item.share.stage != "gather"


def _phases_go_on(batch: MicroBatch, reached: dict[str, int]) -> bool:
    first: dict[str, int] = {}
    for item in batch.items:
        if item.adapter:
            first.setdefault(item.adapter.key, PHASES[item.kind])
    if any(item.adapter and item.adapter.key in reached for item in batch.items if _is_elsewhere(item)):
        return False  # what a part leaves is told apart from what the next one does by their passes
    return all(phase_may_follow(phase, reached.get(key, 0)) for key, phase in first.items())
