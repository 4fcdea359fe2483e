"""One route of an API of text: who asks is let in, what goes wrong is said in the API's words, and whoever hangs up, or
does not read what is sent, costs nobody anything more."""

import contextlib
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import anyio
import msgspec
import structlog
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ...wire.errors import ConnectionLostError, InternalError, LorryError
from ..bodies import BodyBudget
from ..broker import Broker, broker_of
from ..errors import MalformedBodyError, MethodError, NoRouteError, headers_of, status_of
from ..listening import ABORT
from .models import Desk
from .reading import read

T = TypeVar("T")

log = structlog.get_logger("lorry.gateway")

_PING_AFTER_S = 15.0


@dataclass(frozen=True, slots=True)
class Api:
    """How an API says what went wrong, before its first event and after it; and that it is still there."""

    error: Callable[[int, LorryError], Mapping[str, Any]]
    error_event: Callable[[int, LorryError], bytes]
    ping: bytes


class Reply:
    """An answer, whole or in server-sent events. A reader that takes none of it for `patience_s` is cut off."""

    def __init__(self, scope: Scope, send: Send, patience_s: float) -> None:
        self._scope, self._send, self._patience_s = scope, send, patience_s
        self._turn = anyio.Lock()
        self._said_at = 0.0
        self.has_begun = self.is_stream = False

    async def json(self, body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        encoded = msgspec.json.encode(body)
        told = {"content-type": "application/json", "content-length": str(len(encoded))} | dict(headers or {})
        await self._begin(status, told)
        await self._write({"type": "http.response.body", "body": encoded})

    async def open_stream(self) -> None:
        self.is_stream = True
        told = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        await self._begin(200, told | {"x-accel-buffering": "no"})

    async def event(self, data: bytes) -> None:
        async with self._turn:
            self._said_at = anyio.current_time()
            await self._write({"type": "http.response.body", "body": data, "more_body": True})

    async def close(self) -> None:
        if self.is_stream:
            await self._write({"type": "http.response.body", "body": b""})

    async def keep_alive(self, ping: bytes) -> None:
        """Says that it is still there where nothing else was said for a while."""
        while True:
            await anyio.sleep_until(max(self._said_at, anyio.current_time() - 1) + _PING_AFTER_S)
            if self.is_stream and anyio.current_time() - self._said_at >= _PING_AFTER_S:
                await self.event(ping)

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.has_begun = True
        told = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self._write({"type": "http.response.start", "status": status, "headers": told})

    async def _write(self, message: dict[str, Any]) -> None:
        with anyio.move_on_after(self._patience_s) as scope:
            await self._send(message)
        if scope.cancelled_caught:
            if abort := self._scope.get(ABORT):
                abort()
            raise ClientDisconnect


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler gets."""

    request: Request
    broker: Broker
    reply: Reply

    @property
    def desk(self) -> Desk:
        return self.request.app.state.gateway.desk

    @property
    def patience_s(self) -> float:
        """How long a model that is being loaded is waited for."""
        return self.request.app.state.gateway.config.long_poll_s


Work: TypeAlias = Callable[[Call], Awaitable[None]]
Handler: TypeAlias = Callable[[bytes], Work]
"""Understands a body, and says what is to be done."""


def takes(kind: type[T], handle: Callable[[Call, T], Awaitable[None]], refused: dict[str, str]) -> Handler:
    """What is not of this `kind` is refused; `refused` says why there is no such field, by its name."""

    def understood(body: bytes) -> Work:
        request = read(body, kind, refused)
        return lambda call: handle(call, request)

    return understood


def takes_nothing(work: Work) -> Handler:
    return lambda body: work


class Endpoint:
    """An ASGI application. Without a handler for a method, that is said in the API's words, too."""

    def __init__(self, api: Api, handlers: Mapping[str, Handler]) -> None:
        self._api, self._handlers = api, handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        reply = Reply(scope, send, request.app.state.gateway.config.http.slow_after_s)
        try:
            await self._answered(request, reply)
        except ClientDisconnect:
            return  # nobody reads it

    async def _answered(self, request: Request, reply: Reply) -> None:
        try:
            handler = self._handler(request)
            async with broker_of(request) as broker:
                budget: BodyBudget = request.app.state.gateway.bodies
                async with budget.read(request) as body:
                    work = handler(body)
                del body
                await self._worked(work, Call(request, broker, reply))
        except LorryError as error:
            await self._refuse(reply, error)
        except TimeoutError:
            await self._refuse(reply, ConnectionLostError("the broker did not answer in time"))

    def _handler(self, request: Request) -> Handler:
        """Raises NoRouteError, MethodError."""
        if not self._handlers:
            raise NoRouteError(f"there is nothing at {request.url.path}")
        if (handler := self._handlers.get(request.method)) is None:
            known = ", ".join(self._handlers)
            raise MethodError(f"the method is {request.method}, expected {known}", field="method")
        return handler

    async def _worked(self, work: Work, call: Call) -> None:
        """Until it is done, or nobody is there any more who waits for it."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hung_up, call.request, tasks.cancel_scope)
            tasks.start_soon(self._keep_alive, call.reply, tasks.cancel_scope)
            with contextlib.suppress(ClientDisconnect):
                await self._guarded(work, call)
            tasks.cancel_scope.cancel()

    async def _keep_alive(self, reply: Reply, scope: anyio.CancelScope) -> None:
        try:
            await reply.keep_alive(self._api.ping)
        except ClientDisconnect:
            scope.cancel()

    async def _guarded(self, work: Work, call: Call) -> None:
        """What goes wrong is said while the request's tasks are there, so that it leaves as what it is."""
        try:
            await work(call)
            await call.reply.close()
        except LorryError as error:
            await self._refuse(call.reply, error)
        except TimeoutError:
            await self._refuse(call.reply, ConnectionLostError("the broker did not answer in time"))
        except ClientDisconnect:
            raise
        except Exception as error:  # a bug: whoever asked is told so, in the API's words
            log.error("bug", path=call.request.url.path, error=type(error).__name__, at=_place_of(error))
            await self._refuse(call.reply, InternalError("the request could not be answered"))

    async def _refuse(self, reply: Reply, error: LorryError) -> None:
        status = 400 if isinstance(error, MalformedBodyError) else status_of(error)
        if reply.is_stream:
            await reply.event(self._api.error_event(status, error))
            await reply.close()
        elif not reply.has_begun:
            await reply.json(self._api.error(status, error), status, headers_of(error))


async def hung_up(request: Request, scope: anyio.CancelScope) -> None:
    """Cancels `scope` once nobody is at the other end."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _place_of(error: Exception) -> str:
    """Where it was raised. What it says may have somebody's prompt in it, and goes to no log."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{last.filename}:{last.lineno}"
