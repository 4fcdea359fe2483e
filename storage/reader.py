"""Reads from a thread, one at a time, on a connection of their own: they never wait for a commit, nor delay one."""

from collections.abc import Callable
from typing import TypeVar

import anyio
from anyio import to_thread

from .store import Store

T = TypeVar("T")


class Reader:
    """`at_leisure` is a connection for what may take long, so that nobody else waits for that."""

    def __init__(self, store: Store, at_leisure: Store) -> None:
        self._store, self._at_leisure = store, at_leisure
        self._thread, self._slow_thread = anyio.CapacityLimiter(1), anyio.CapacityLimiter(1)

    async def read(self, question: Callable[[Store], T]) -> T:
        """`question` runs in a thread, with the store."""
        return await to_thread.run_sync(question, self._store, limiter=self._thread)

    async def read_at_leisure(self, question: Callable[[Store], T]) -> T:
        """The same, beside all others: sums over what was used, and lists that grow for ever."""
        return await to_thread.run_sync(question, self._at_leisure, limiter=self._slow_thread)
