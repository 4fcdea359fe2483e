"""One connection to the broker for each API key: opened on first use, kept while used, closed when idle."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import structlog
from anyio.abc import TaskGroup

from ..client.connection import Connection, open_connection
from ..wire.errors import ConnectionLostError, LorryError

log = structlog.get_logger("lorry.gateway")


@dataclass(slots=True, eq=False)
class _Entry:
    settled: anyio.Event = field(default_factory=anyio.Event)
    connection: Connection | None = None
    error: LorryError | None = None
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
        if entry is None or (entry.connection and entry.connection.refused):
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
        try:
            async with open_connection(self._address, key, self._server_key) as connection:
                entry.connection = connection
                entry.settled.set()
                await self._idle(entry)
                self._entries.pop(key, None)
        except LorryError as error:
            entry.error = error
        except Exception:  # one tenant's connection must not take the others' along
            log.exception("connection lost")
        finally:
            if self._entries.get(key) is entry:
                del self._entries[key]
            entry.settled.set()

    async def _idle(self, entry: _Entry) -> None:
        while entry.users or anyio.current_time() - entry.last_used < self._idle_s:  # noqa: ASYNC110 - time is the event
            await anyio.sleep(self._idle_s)
