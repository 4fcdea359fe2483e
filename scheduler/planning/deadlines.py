"""By when clients want their commands to be over. Pure: the time is passed in, in Unix seconds."""

import heapq
from math import inf

from ...wire.ids import FutureId


class Deadlines:
    def __init__(self) -> None:
        self._by_time: list[tuple[float, FutureId]] = []
        self._open: dict[FutureId, float] = {}

    def add(self, future: FutureId, at: float) -> None:
        self._open[future] = at
        heapq.heappush(self._by_time, (at, future))

    def over(self, future: FutureId) -> None:
        """The command has ended."""
        self._open.pop(future, None)
        if len(self._by_time) > 2 * len(self._open) + 64:
            self._by_time = [(at, open_) for open_, at in self._open.items()]
            heapq.heapify(self._by_time)

    def next_at(self) -> float | None:
        while self._by_time and self._open.get(self._by_time[0][1]) != self._by_time[0][0]:
            heapq.heappop(self._by_time)
        return self._by_time[0][0] if self._by_time else None

    def passed(self, now: float, most: float = inf) -> list[FutureId]:
        """Those whose time is up, the earliest first, so many at `most`; each is told once."""
        found: list[FutureId] = []
        while len(found) < most and (at := self.next_at()) is not None and at <= now:
            _, future = heapq.heappop(self._by_time)
            del self._open[future]
            found.append(future)
        return found
