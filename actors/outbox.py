"""How commands ended, in the order of their run: what comes behind a save that is being written waits for that. Pure.

The broker takes a result for the sign that all before it are over: a run that is rebuilt repeats what was, and executes
then what was not.
"""

from collections import deque
from dataclasses import dataclass

from ..wire.actor_messages import Outcome
from ..wire.ids import BatchId, FutureId


@dataclass(slots=True)
class _Kept:
    batch: BatchId
    future: FutureId
    end: tuple[Outcome, bytes] | None


class Outbox:
    def __init__(self) -> None:
        self._kept: dict[str, deque[_Kept]] = {}

    def keeps(self, run: str, batch: BatchId, future: FutureId, end: tuple[Outcome, bytes] | None) -> bool:
        """Whether it must wait: for its own end, where that is None, or for another's of its run."""
        if end is not None and run not in self._kept:
            return False
        self._kept.setdefault(run, deque()).append(_Kept(batch, future, end))
        return True

    def ended(self, run: str, outcome: Outcome) -> list[tuple[BatchId, Outcome, bytes]]:
        """What waited for its end has it: what may go now, in order."""
        kept = self._kept[run]
        next(one for one in kept if one.future == outcome.future).end = outcome, b""
        due: list[tuple[BatchId, Outcome, bytes]] = []
        while kept and (end := kept[0].end) is not None:
            due.append((kept.popleft().batch, *end))
        if not kept:
            del self._kept[run]
        return due
