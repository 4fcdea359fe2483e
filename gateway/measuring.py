"""HTTP requests, counted for Prometheus. Routes are told by their templates: no path that a client made up is."""

import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .routes import Templates

disable_created_metrics()

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class HttpCounts:
    """A registry of its own. `connections` and `keys` are asked when somebody reads it."""

    def __init__(self, connections: Callable[[], int], keys: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "lorry_http_requests",
            "Requests that were answered, by route, method and status.",
            ["route", "method", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "lorry_http_request_seconds",
            "From a request's head to the end of its answer; long polls wait for results.",
            ["route", "method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("lorry_http_requests_in_flight", "Requests that are being answered.", registry=registry)
        Gauge("lorry_http_connections", "Connections that are open.", registry=registry).set_function(connections)
        Gauge(
            "lorry_http_keys", "Keys that the gateway has a connection to the broker for.", registry=registry
        ).set_function(keys)

    def text(self) -> str:
        return generate_latest(self._registry).decode()


class Measured:
    """The application, with its requests counted."""

    def __init__(self, app: ASGIApp, counts: HttpCounts, templates: Templates) -> None:
        self._app, self._counts, self._templates = app, counts, templates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._counts.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, noting)
            finally:
                route, method = self._templates.of(scope), scope["method"]
                method = method if method in _METHODS else "other"
                self._counts.requests.labels(route, method, str(status)).inc()
                self._counts.seconds.labels(route, method).observe(time.perf_counter() - started)
