"""HTTP's socket: uvicorn, and what it leaves out: how many connections there may be, and how slow a request may come.

Whoever is served already goes on, however many others knock. uvicorn's own limit would refuse everybody's requests.
"""

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..wire.errors import InvalidRequestError
from .config import HttpSettings
from .peers import Network, is_among, peer_of, trusted
from .tls import Certificate, listening_with

ABORT = "lorry.abort"
"""In a request's scope: what ends its connection at once, with all that its reader has not taken."""
_HEAD_BYTES = 64 * 1024
_LEAST_BYTES = 16 * 1024
"""Of a request, that come in `slow_after_s`, unless it ends."""


class Server(uvicorn.Server):
    """Signals are the process's business, not the server's. A handshake takes `slow_after_s` at most."""

    def __init__(self, config: uvicorn.Config, slow_after_s: float) -> None:
        super().__init__(config)
        self._slow_after_s = slow_after_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which knows no limit to a handshake. `lifespan` is off."""
        loop, config = asyncio.get_running_loop(), self.config

        def connected() -> asyncio.Protocol:
            return config.http_protocol_class(config=config, server_state=self.server_state, app_state={})  # type: ignore[call-arg]

        self.servers = [
            await loop.create_server(
                connected,
                sock=each,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=self._slow_after_s if config.ssl else None,
            )
            for each in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def server(app: FastAPI, http: HttpSettings, certificate: Certificate | None) -> Server:
    """Raises InvalidRequestError."""
    proxies = trusted(http)
    settings = uvicorn.Config(
        app,
        http=_protocol(_Bounds(http, proxies)),
        ws="none",
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=[str(network) for network in proxies],
        ssl_context_factory=listening_with(certificate) if certificate else None,
    )
    return Server(settings, http.slow_after_s)


def listen(host: str, port: int) -> socket.socket:
    """Raises InvalidRequestError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named: it would add 40 ms to every answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        wanted = f"an address that is free ({error.strerror}); --http HOST:PORT names another, --no-http does without"
        raise InvalidRequestError.of("http", f"{host}:{port}", wanted) from None
    return listening


@dataclass(slots=True)
class _Bounds:
    """`open` counts connections by who is at the other end; a proxy stands for many."""

    http: HttpSettings
    proxies: list[Network]
    open: Counter[str] = field(default_factory=Counter[str])

    def is_full(self, peer: str, open_: int) -> bool:
        if open_ > self.http.http_connections:
            return True
        return self.open[peer] > self.http.connections_per_address and not is_among(peer, self.proxies)


class _Bounded(HttpToolsProtocol):
    """One connection. A request that is on its way must be over, or have brought some more, each `slow_after_s`."""

    bounds: ClassVar[_Bounds]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._peer = peer_of(self.client[0]) if self.client else ""
        self._came = self._came_before = self._came_with_the_head = 0
        self._is_coming = self._in_head = True
        self._timer: asyncio.TimerHandle | None = None
        self.bounds.open[self._peer] += 1
        if self.bounds.is_full(self._peer, len(self.connections)):
            self.app = _full
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._look_no_more()
        self.bounds.open[self._peer] -= 1
        if not self.bounds.open[self._peer]:
            del self.bounds.open[self._peer]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._came += len(data)
        if self._timer is None:
            self._look_later()
        super().data_received(data)
        if self._in_head and self._came - self._came_with_the_head > _HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_coming = True

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._look_later()
        super().on_headers_complete()
        self.scope[ABORT] = self.transport.abort  # type: ignore[typeddict-unknown-key]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_coming, self._in_head, self._came_with_the_head = False, True, self._came
        self._look_no_more()

    def _look_later(self) -> None:
        self._look_no_more()
        self._came_before = self._came
        self._timer = self.loop.call_later(self.bounds.http.slow_after_s, self._look)

    def _look(self) -> None:
        if self._is_slow:
            self.transport.abort()
        else:
            self._look_later()

    @property
    def _is_slow(self) -> bool:
        if not self._is_coming:  # something came that begins no request
            return not self.cycle or self.cycle.response_complete
        if self.flow.read_paused:  # it waits for us
            return False
        return self._in_head or self._came - self._came_before < _LEAST_BYTES

    def _look_no_more(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


def _protocol(bounds: _Bounds) -> type[_Bounded]:
    """uvicorn makes one of it for each connection, and knows nothing of bounds."""

    class Bounded(_Bounded):
        pass

    Bounded.bounds = bounds
    return Bounded


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    """To a connection that is one too many."""
    headers = {"Retry-After": "1", "Connection": "close"}
    body: dict[str, Any] = {"detail": "Too many connections are open. Send it again in a moment.", "category": "server"}
    await JSONResponse(body, 503, headers)(scope, receive, send)
