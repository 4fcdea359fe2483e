"""One connection to the broker for each API key: opened on first use, kept while used, closed when idle."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import structlog
import zmq
from anyio.abc import TaskGroup

from ..client.connection import Connection, open_connection
from ..wire.errors import ConnectionLostError, LorryError

log = structlog.get_logger("lorry.gateway")


E = TypeVar("E", bound=Exception)


@dataclass(slots=True, eq=False)
class _Entry:
    settled: anyio.Event = field(default_factory=anyio.Event)
    connection: Connection | None = None
    error: LorryError | None = None
    replaced: anyio.Event = field(default_factory=anyio.Event)
    users: int = 0
    last_used: float = 0.0


class Connections:
    def __init__(self, address: str, server_key: str | None, idle_s: float, tasks: TaskGroup) -> None:
        self._address, self._server_key, self._idle_s, self._tasks = address, server_key, idle_s, tasks
        self._entries: dict[str, _Entry] = {}

    @asynccontextmanager
    async def use(self, key: str) -> AsyncGenerator[Connection]:
        """The key's connection, kept open at least until the block ends.

        Raises AuthenticationError, and ConnectionLostError where the broker does not answer.
        """
        entry = self._entries.get(key)
        if entry and entry.connection and entry.connection.is_over:
            entry.replaced.set()
            entry = None
        if entry is None:
            entry = self._entries[key] = _Entry()
            self._tasks.start_soon(self._keep, key, entry)
        entry.users += 1
        try:
            await entry.settled.wait()
            if entry.connection is None:
                raise entry.error or ConnectionLostError(f"no connection to {self._address}")
            yield entry.connection
        finally:
            entry.users -= 1
            entry.last_used = anyio.current_time()

    async def _keep(self, key: str, entry: _Entry) -> None:
        """One tenant's connection must not take the others' along: what ends it is for those who use it."""
        try:
            async with open_connection(self._address, key, self._server_key, relays=True) as connection:
                entry.connection = connection
                entry.settled.set()
                await self._idle(entry)
                self._forget(key, entry)
        except* LorryError as errors:
            entry.error = _first(errors)
            if entry.connection:
                log.warning("connection lost", error=str(entry.error))
        except* zmq.ZMQError as errors:
            log.warning("connection lost", error=str(_first(errors)))
        finally:
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
