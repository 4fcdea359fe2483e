"""The HTTP server: the routers put together, and the process that serves them."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
from fastapi import FastAPI
from starlette.routing import Mount

from ..wire.tasks import background_tasks
from ..wire.tracing import tracing
from . import admin, errors, health, jobs, listening, metrics
from .anthropic import routes as anthropic
from .bodies import BodyBudget
from .chat.models import Desk
from .config import GatewayConfig
from .connections import Connections
from .console import app as console
from .console.visiting import PATH
from .measuring import HttpCounts, Measured
from .openai import routes as openai
from .routes import API, Templates
from .spans import Traced
from .tinker import (
    audit,
    auth,
    billing,
    checkpoints,
    custom_losses,
    downloads,
    futures,
    models,
    run_metrics,
    runs,
    sampling,
    service,
    sessions,
    traces,
    training,
    weights,
)
from .tls import certificate_of

_WORK = (training, custom_losses, futures, sampling, weights, models, service, auth)
_RECORDS = (sessions, traces, runs, run_metrics, downloads, checkpoints, billing, audit)
_OF_TEXT = {
    "/v1": [*openai.ROUTES, *anthropic.ROUTES, *openai.NOWHERE],
    "/services/tinker-prod/oai/api/v1": [*openai.ROUTES, *openai.NOWHERE],
    "/services/tinker-prod/anthropic/api/v1": [*anthropic.ROUTES, *anthropic.NOWHERE],
}
"""Where programs expect the APIs of text: at the root, and where the hosted service has them."""
_ROUTERS = (health, jobs, *_WORK, *_RECORDS)


@dataclass(frozen=True, slots=True)
class Gateway:
    """What all handlers share; nothing that another gateway could not make anew."""

    config: GatewayConfig
    connections: Connections
    bodies: BodyBudget
    counts: HttpCounts
    desk: Desk = field(default_factory=Desk)
    exports: anyio.Semaphore = field(default_factory=lambda: anyio.Semaphore(1))
    """Each keeps a thread busy."""


def build(gateway: Gateway) -> FastAPI:
    app = FastAPI(title="Lorry", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.gateway = gateway
    errors.install(app)
    for module in _ROUTERS:
        app.include_router(module.router, prefix=API)
    app.include_router(metrics.router)
    for prefix, routes in _OF_TEXT.items():
        app.router.routes.append(Mount(prefix, routes=routes))
    app.mount("/admin", admin.app(gateway))
    app.mount(PATH, console.app(gateway))
    templates = Templates((module.router for module in _ROUTERS), _OF_TEXT | {PATH: console.ROUTES})
    app.add_middleware(Measured, counts=gateway.counts, templates=templates)
    app.add_middleware(Traced, tracing=tracing, templates=templates)
    return app


@asynccontextmanager
async def running(config: GatewayConfig) -> AsyncGenerator[str]:
    """A gateway for as long as the block lasts; yields its URL. Raises InvalidRequestError where it cannot listen,
    or not as it is to."""
    certificate = certificate_of(config.http)
    with listening.listen(config.host, config.port) as socket:
        async with background_tasks() as tasks:
            connections = Connections(
                config.connect, config.server_key, config.idle_connection_s, tasks, config.http.requests_per_key
            )
            bodies = BodyBudget(config.max_body_bytes, config.max_bytes_in_flight)
            counts = HttpCounts(lambda: len(server.server_state.connections), lambda: len(connections))
            app = build(Gateway(config, connections, bodies, counts))
            server = listening.server(app, config.http, certificate)
            tasks.start_soon(server.serve, [socket])
            host = f"[{config.host}]" if ":" in config.host else config.host
            try:
                yield f"{'https' if certificate else 'http'}://{host}:{socket.getsockname()[1]}"
            finally:
                server.should_exit = True
                with anyio.CancelScope(shield=True), anyio.move_on_after(2):
                    await server.shutdown([socket])
