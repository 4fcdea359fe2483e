"""A network that is bad at connections: it cuts them in the middle of a message, or goes on as if nothing had happened
and carries nothing any more. For the bytes of any protocol."""

import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import anyio
from anyio.abc import SocketAttribute, SocketStream

from lorry.wire.tasks import background_tasks

_CHUNK = 4096
GONE = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError)


class Cables:
    """Connections to one address. Each is cut after so many bytes, from and to, as `cuts_after` says; None: never."""

    def __init__(self, behind: str, seed: int = 0, cuts_after: tuple[int, int] | None = None) -> None:
        host, _, port = behind.removeprefix("tcp://").rpartition(":")
        self._host, self._port = host, int(port)
        self._chance = random.Random(seed)
        self.cuts_after = cuts_after
        self.cuts = 0
        self.opened = 0
        self.is_down = False
        self._scopes: set[anyio.CancelScope] = set()
        self._dead: set[anyio.CancelScope] = set()

    def cut(self) -> None:
        """All connections that there are, at once."""
        for scope in self._scopes:
            scope.cancel()
            self.cuts += 1

    def swallow(self) -> None:
        """The connections that there are carry nothing any more, and nobody is told. New ones do."""
        self._dead |= self._scopes

    async def carry(self, near: SocketStream) -> None:
        async with near:
            if self.is_down:
                return
            with suppress(*GONE):
                async with await anyio.connect_tcp(self._host, self._port) as far:
                    await self._join(near, far)

    async def _join(self, near: SocketStream, far: SocketStream) -> None:
        self.opened += 1
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._one_way, near, far, scope)
                    tasks.start_soon(self._one_way, far, near, scope)
            finally:
                self._scopes.discard(scope)
                self._dead.discard(scope)

    async def _one_way(self, source: SocketStream, sink: SocketStream, scope: anyio.CancelScope) -> None:
        left = None if self.cuts_after is None else self._chance.randint(*self.cuts_after)
        with suppress(*GONE):
            while left is None or left > 0:
                chunk = await source.receive(_CHUNK)
                if scope in self._dead:
                    continue
                await sink.send(chunk if left is None else chunk[:left])
                left = None if left is None else left - len(chunk)
            self.cuts += 1
        scope.cancel()


@asynccontextmanager
async def bad_at_connections(cables: Cables) -> AsyncGenerator[str]:
    """The address in front, for as long as the block lasts."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, background_tasks() as tasks:
        tasks.start_soon(listener.serve, cables.carry)
        yield f"tcp://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
