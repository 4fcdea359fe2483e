"""Group commit: one writer, one transaction at a time, each covering all that came in during the one before.

What is handed in becomes durable in the order it came; `done` is called on the event loop once it is.
"""

import asyncio
import sqlite3
from collections.abc import Callable
from typing import TypeAlias

import anyio
from anyio import to_thread

from .store import Store

Operation: TypeAlias = Callable[[Store], None]
Done: TypeAlias = Callable[[], None]


class Writer:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: list[tuple[Operation, Done]] = []
        self._wake = asyncio.Event()

    def write(self, operation: Operation, done: Done) -> None:
        """`operation` runs in the writer's thread, inside a transaction; then `done` on the loop."""
        self._pending.append((operation, done))
        self._wake.set()

    async def write_and_wait(self, operation: Operation) -> None:
        durable = anyio.Event()
        self.write(operation, durable.set)
        await durable.wait()

    async def run(self) -> None:
        """Commit until cancelled. A commit under way is finished first. An operation that the database refuses is a
        bug or a broken disk, and nothing may be acknowledged after it: it ends the broker."""
        thread = anyio.CapacityLimiter(1)
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                batch, self._pending = self._pending, []
                await to_thread.run_sync(self._commit, [operation for operation, _ in batch], limiter=thread)
                for _, done in batch:
                    done()

    def _commit(self, operations: list[Operation]) -> None:
        try:
            with self._store.transaction():
                for operation in operations:
                    operation(self._store)
        except sqlite3.Error as error:
            raise RuntimeError(f"the database refused a commit of {len(operations)} operations: {error}") from error
