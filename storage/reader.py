"""Reads from a thread, one at a time, on a connection of their own: they never wait for a commit, nor delay one."""

from collections.abc import Callable
from typing import TypeVar

import anyio
from anyio import to_thread

from .store import Store

T = TypeVar("T")


class Reader:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = anyio.CapacityLimiter(1)

    async def read(self, question: Callable[[Store], T]) -> T:
        """`question` runs in a thread, with the store."""
        return await to_thread.run_sync(question, self._store, limiter=self._thread)
