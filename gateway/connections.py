"""One connection to the broker for each API key: opened on first use, kept while used, closed when idle. A key has so
many requests under way at the same time, and no more."""

import math
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import structlog
import zmq
from anyio.abc import TaskGroup

from ..client.connection import Connection, open_connection
from ..wire.errors import AuthenticationError, ConnectionLostError, LorryError
from .errors import OverloadedError
from .guests import Guests

log = structlog.get_logger("lorry.gateway")


E = TypeVar("E", bound=Exception)

_MAY_WAIT = 0.75
"""Of a key's requests: what they wait for may be what comes next."""
_OPENING_AT_MOST = 64
"""At the same time, of keys that nobody knows yet; the others wait for their turn."""


@dataclass(slots=True, eq=False)
class _Entry:
    settled: anyio.Event = field(default_factory=anyio.Event)
    connection: Connection | None = None
    error: LorryError | None = None
    replaced: anyio.Event = field(default_factory=anyio.Event)
    users: int = 0
    waiting: int = 0
    last_used: float = 0.0


class Connections:
    def __init__(
        self, address: str, server_key: str | None, idle_s: float, tasks: TaskGroup, requests_at_most: int = 1000
    ) -> None:
        self._address, self._server_key, self._idle_s, self._tasks = address, server_key, idle_s, tasks
        self._requests_at_most, self._waiting_at_most = requests_at_most, math.ceil(requests_at_most * _MAY_WAIT)
        self._entries: dict[str, _Entry] = {}
        self._guests = Guests(anyio.current_time)
        self._opening = anyio.Semaphore(_OPENING_AT_MOST)

    def __len__(self) -> int:
        """Of how many keys there is one, or will be."""
        return len(self._entries)

    @asynccontextmanager
    async def use(self, key: str, peer: str, *, waits: bool = False) -> AsyncGenerator[Connection]:
        """The key's connection, kept open at least until the block ends. `peer` is who shows the key; who only `waits`
        for what was sent before leaves room for what he sends next.

        Raises AuthenticationError, TooManyTriesError where the peer showed many wrong keys, OverloadedError where many
        requests of this key are being answered, and ConnectionLostError where the broker does not answer.
        """
        entry = self._entries.get(key)
        if entry and entry.connection and entry.connection.is_over:
            entry.replaced.set()
            entry = None
        if entry is None:
            await self._guests.try_(key, peer)
            entry = self._entries[key] = _Entry()
            self._tasks.start_soon(self._keep, key, entry, peer)
        if entry.users >= self._requests_at_most or (waits and entry.waiting >= self._waiting_at_most):
            problem = f"{entry.users:,} requests with this key are being answered, {entry.waiting:,} of which wait"
            limit = f"{self._requests_at_most:,}, of which {self._waiting_at_most:,} may wait"
            raise OverloadedError(f"{problem} for results; the limit is {limit}")
        entry.users += 1
        entry.waiting += waits
        try:
            await entry.settled.wait()
            if entry.connection is None:
                raise entry.error or ConnectionLostError(f"no connection to {self._address}")
            yield entry.connection
        finally:
            entry.users -= 1
            entry.waiting -= waits
            entry.last_used = anyio.current_time()

    async def _keep(self, key: str, entry: _Entry, peer: str) -> None:
        """One tenant's connection must not take the others' along: what ends it is for those who use it."""
        try:
            async with AsyncExitStack() as stack:
                async with self._opening:
                    opening = open_connection(self._address, key, self._server_key, relays=True)
                    entry.connection = await stack.enter_async_context(opening)
                self._guests.was_right(key, peer)
                entry.settled.set()
                await self._idle(entry)
                self._forget(key, entry)
        except* LorryError as errors:
            entry.error = _first(errors)
            if isinstance(entry.error, AuthenticationError):
                self._guests.was_wrong(key, entry.error)
            if entry.connection:
                log.warning("connection lost", error=str(entry.error))
        except* zmq.ZMQError as errors:
            log.warning("connection lost", error=str(_first(errors)))
        finally:
            if entry.connection is None and not isinstance(entry.error, AuthenticationError):
                self._guests.was_not_tried(key, peer)
            self._forget(key, entry)
            entry.settled.set()

    def _forget(self, key: str, entry: _Entry) -> None:
        """So that the next use opens a connection anew, unless one has already."""
        if self._entries.get(key) is entry:
            del self._entries[key]

    async def _idle(self, entry: _Entry) -> None:
        """Returns when nobody has used it for a while, or another has taken its place."""
        while entry.users or anyio.current_time() - entry.last_used < self._idle_s:
            with anyio.move_on_after(self._idle_s):
                await entry.replaced.wait()
                return


def _first(errors: BaseExceptionGroup[E]) -> E:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
