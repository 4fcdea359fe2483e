"""What the broker is told of each run, in the order in which it happened. Pure.

What comes behind a save that is being written waits for its end, for the broker takes a result, and a snapshot, for the
sign that all before it are over: a run that is rebuilt repeats what was, and executes then what was not.
"""

from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from ..wire.actor_messages import Outcome, SnapshotFailed, SnapshotTaken
from ..wire.ids import BatchId, FutureId

Written: TypeAlias = SnapshotTaken | SnapshotFailed


@dataclass(frozen=True, slots=True)
class End:
    """How a command of a batch ended, with its result."""

    batch: BatchId
    outcome: Outcome
    payload: bytes


@dataclass(slots=True)
class _Kept:
    """`told` is None of a command that has not ended: `future`, of `batch`."""

    told: End | Written | None
    batch: BatchId | None = None
    future: FutureId | None = None


class Outbox:
    def __init__(self) -> None:
        self._kept: dict[str, deque[_Kept]] = {}

    def keeps(self, run: str, told: End | Written) -> bool:
        """Whether it must wait for a command of its run."""
        if run not in self._kept:
            return False
        self._kept[run].append(_Kept(told))
        return True

    def wait_for(self, run: str, batch: BatchId, future: FutureId) -> None:
        """This command has its place in the order, and will end later."""
        self._kept.setdefault(run, deque()).append(_Kept(None, batch, future))

    def ended(self, run: str, outcome: Outcome) -> list[End | Written]:
        """What was waited for has ended: what may be told now, in order."""
        kept = self._kept[run]
        own = next(one for one in kept if one.future == outcome.future and one.told is None)
        assert own.batch is not None
        own.told = End(own.batch, outcome, b"")
        due: list[End | Written] = []
        while kept and (told := kept[0].told) is not None:
            due.append(told)
            kept.popleft()
        if not kept:
            del self._kept[run]
        return due
