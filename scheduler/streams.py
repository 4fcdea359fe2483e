"""What was made of samples that are streamed and not over: for who watches late, and for an actor that goes on where
another was lost. Pure.
"""

from ..wire.ids import FutureId

_KEPT_BYTES = 64 << 20


class Streams:
    """Up to `limit` bytes in all: where it is reached, what has most is no longer kept. Who would go on with it begins
    anew, from the same seed."""

    def __init__(self, limit: int = _KEPT_BYTES) -> None:
        self._limit, self._bytes = limit, 0
        self._made: dict[FutureId, list[bytes]] = {}
        self._sizes: dict[FutureId, int] = {}
        self._let_go: set[FutureId] = set()

    def made(self, future: FutureId, pieces: bytes) -> None:
        """An encoded list of pieces, after those that were made before."""
        if future in self._let_go:
            return
        self._made.setdefault(future, []).append(pieces)
        self._sizes[future] = self._sizes.get(future, 0) + len(pieces)
        self._bytes += len(pieces)
        while self._bytes > self._limit:
            most = max(self._sizes, key=lambda other: self._sizes[other])
            self._drop(most)
            self._let_go.add(most)

    def so_far(self, future: FutureId) -> list[bytes]:
        return self._made.get(future, [])

    def over(self, future: FutureId) -> None:
        self._drop(future)
        self._let_go.discard(future)

    def _drop(self, future: FutureId) -> None:
        self._made.pop(future, None)
        self._bytes -= self._sizes.pop(future, 0)
