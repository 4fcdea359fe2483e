"""A span for each HTTP request, a child of what its `traceparent` header names; commands are children of it in turn."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..wire.tracing import Tracing, understood, within
from .routes import API, Templates

_UNTOLD = frozenset(("/metrics", f"{API}/healthz", f"{API}/readyz"))
"""What is asked for ever, by machines."""


class Traced:
    """The application, with its requests traced where traces are wanted."""

    def __init__(self, app: ASGIApp, tracing: Tracing, templates: Templates) -> None:
        self._app, self._tracing, self._templates = app, tracing, templates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._tracing.is_on or scope["type"] != "http" or scope["path"] in _UNTOLD:
            await self._app(scope, receive, send)
            return
        parent, status = understood(Headers(scope=scope).get("traceparent")), 500
        span = self._tracing.begin(scope["method"], parent, "server", {"http.request.method": scope["method"]})
        assert span is not None, "tracing is on"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with within(span.traceparent):
                await self._app(scope, receive, noting)
        finally:
            route = self._templates.of(scope)
            span.name(f"{scope['method']} {route}")
            span.note({"http.route": route, "http.response.status_code": status})
            span.end(str(status) if status >= 500 else None)
