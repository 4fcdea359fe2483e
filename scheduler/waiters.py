"""Who is told when a future resolves. Pure bookkeeping: which futures are open, and which connections wait for each."""

from ..wire.ids import FutureId


class Waiters:
    def __init__(self) -> None:
        self._open: dict[FutureId, set[bytes]] = {}

    def opened(self, future: FutureId) -> None:
        """Accepted, and not resolved yet."""
        self._open.setdefault(future, set())

    def is_open(self, future: FutureId) -> bool:
        return future in self._open

    def watch(self, future: FutureId, connection: bytes) -> None:
        self._open[future].add(connection)

    def resolved(self, future: FutureId) -> set[bytes]:
        """Closes the future; returns the connections to tell."""
        return self._open.pop(future, set())

    def left(self, connection: bytes) -> None:
        for connections in self._open.values():
            connections.discard(connection)
