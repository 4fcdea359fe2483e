"""Who is told when a future resolves. Pure bookkeeping: which futures are open, and which connections wait for each."""

from collections.abc import Set

import anyio

from ..wire.ids import FutureId, LaneId

_NOBODY = frozenset[bytes]()


class Waiters:
    def __init__(self) -> None:
        self._open: dict[FutureId, set[bytes]] = {}
        self._bells: dict[LaneId, anyio.Event] = {}

    def opened(self, future: FutureId) -> None:
        """Accepted, and not resolved yet."""
        self._open.setdefault(future, set())

    def is_open(self, future: FutureId) -> bool:
        return future in self._open

    def watch(self, future: FutureId, connection: bytes) -> None:
        self._open[future].add(connection)

    def of(self, future: FutureId) -> Set[bytes]:
        """The connections that wait for it."""
        return self._open.get(future, _NOBODY)

    def resolved(self, future: FutureId) -> set[bytes]:
        """Closes the future; returns the connections to tell."""
        if bell := self._bells.pop(LaneId(future.rpartition(":")[0]), None):
            bell.set()
        return self._open.pop(future, set())

    def bell(self, lane: LaneId) -> anyio.Event:
        """Rings when the next future of this lane resolves."""
        return self._bells.setdefault(lane, anyio.Event())

    def left(self, connection: bytes) -> None:
        for connections in self._open.values():
            connections.discard(connection)
