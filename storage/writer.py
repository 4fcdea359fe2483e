"""Group commit: one writer, one transaction at a time, each covering all that came in during the one before.

What is handed in becomes durable in the order it came; `done` is called on the event loop once it is. A disk that is
full or read-only delays that: nothing is acknowledged, and nothing lost, until it can be written again.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import anyio
import structlog
from anyio import to_thread
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential

from .connection import may_pass
from .store import Store

log = structlog.get_logger("lorry.storage")

T = TypeVar("T")
Operation: TypeAlias = Callable[[Store], T]
Done: TypeAlias = Callable[[T], None]

_LONGEST_PAUSE_S = 5.0
_BACKLOG_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Pending:
    operation: Operation[Any]
    done: Done[Any]
    size: int


class Writer:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: list[_Pending] = []
        self._wake = asyncio.Event()
        self._backlog = 0
        self._has_room, self._may_ask = asyncio.Event(), asyncio.Event()
        self._trouble: str | None = None
        self.on_commit: Callable[[int, float], None] = _nobody
        """Told how many operations a commit had, and how many seconds it took, tries that failed included."""
        self._thread = anyio.CapacityLimiter(1)
        self._weigh()

    @property
    def trouble(self) -> str | None:
        """Why nothing can be written at the moment; None while all is well."""
        return self._trouble

    def write(self, operation: Operation[T], done: Done[T] | None = None, size: int = 0) -> None:
        """`operation` runs in the writer's thread, inside a transaction; then `done` on the loop, with what came of it.

        It may run more than once, until its transaction is durable: let it change nothing but the store. `size` is what
        it holds in memory, in bytes.
        """
        self._pending.append(_Pending(operation, done or _ignore, size))
        self._backlog += size
        self._weigh()
        self._wake.set()

    async def write_and_wait(self, operation: Operation[T]) -> T:
        written: list[T] = []
        durable = anyio.Event()

        def done(result: T) -> None:
            written.append(result)
            durable.set()

        self.write(operation, done)
        await durable.wait()
        return written[0]

    async def room(self) -> None:
        """Wait while what is not written yet takes more memory than it may."""
        await self._has_room.wait()

    @property
    def takes_requests(self) -> bool:
        return self._may_ask.is_set()

    async def room_for_requests(self) -> None:
        """The same; but in trouble, who asks is to be told."""
        await self._may_ask.wait()

    def _weigh(self) -> None:
        has_room = self._backlog <= _BACKLOG_BYTES
        for event, is_set in ((self._has_room, has_room), (self._may_ask, has_room or self._trouble is not None)):
            event.set() if is_set else event.clear()

    async def run(self) -> None:
        """Commit until cancelled. A commit under way is finished first. An operation that the database refuses is a
        bug or a damaged file, and nothing may be acknowledged after it: it ends the broker."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                batch, self._pending = self._pending, []
                started = time.monotonic()
                results = await self._durable([pending.operation for pending in batch])
                self.on_commit(len(batch), time.monotonic() - started)
                self._backlog -= sum(pending.size for pending in batch)
                self._weigh()
                for pending, result in zip(batch, results, strict=True):
                    pending.done(result)

    async def _durable(self, operations: list[Operation[Any]]) -> list[Any]:
        """Tried again for as long as the disk does not take it."""
        attempts = AsyncRetrying(
            retry=retry_if_exception(may_pass),
            wait=wait_exponential(multiplier=0.25, max=_LONGEST_PAUSE_S),
            before_sleep=self._in_trouble,
        )
        results = await attempts(to_thread.run_sync, self._commit, operations, limiter=self._thread)
        if self._trouble is not None:
            log.info("the database can be written again")
            self._trouble = None
        return results

    def _in_trouble(self, attempt: RetryCallState) -> None:
        error = attempt.outcome.exception() if attempt.outcome else None
        if self._trouble is None:
            log.error("the database cannot be written; nothing is acknowledged until it can", error=str(error))
        self._trouble = f"the server cannot write its journal: {error}"
        self._weigh()

    def _commit(self, operations: list[Operation[Any]]) -> list[Any]:
        try:
            with self._store.transaction():
                return [operation(self._store) for operation in operations]
        except sqlite3.Error as error:
            if may_pass(error):
                raise
            raise RuntimeError(f"the database refused a commit of {len(operations)} operations: {error}") from error


def _ignore(result: object) -> None:
    pass


def _nobody(operations: int, seconds: float) -> None:
    pass
