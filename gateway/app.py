"""The HTTP server: the routers put together, and the process that serves them."""

import contextlib
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import uvicorn
from fastapi import FastAPI

from ..wire.errors import InvalidRequestError
from ..wire.tasks import background_tasks
from . import admin, errors, health
from .bodies import BodyBudget
from .config import GatewayConfig
from .connections import Connections
from .tinker import (
    audit,
    auth,
    billing,
    checkpoints,
    downloads,
    futures,
    models,
    runs,
    sampling,
    service,
    sessions,
    training,
    unsupported,
    weights,
)

_WORK = (training, futures, sampling, weights, models, service, auth)
_RECORDS = (sessions, runs, downloads, checkpoints, billing, audit, unsupported)
_ROUTERS = (health, *_WORK, *_RECORDS)


@dataclass(frozen=True, slots=True)
class Gateway:
    """What all handlers share; nothing that another gateway could not make anew."""

    config: GatewayConfig
    connections: Connections
    bodies: BodyBudget


def build(gateway: Gateway) -> FastAPI:
    app = FastAPI(title="Lorry", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.gateway = gateway
    errors.install(app)
    for module in _ROUTERS:
        app.include_router(module.router, prefix="/api/v1")
    app.mount("/admin", admin.app(gateway))
    return app


class _Server(uvicorn.Server):
    """Signals are the process's business, not the server's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


@asynccontextmanager
async def running(config: GatewayConfig) -> AsyncGenerator[str]:
    """A gateway for as long as the block lasts; yields its URL. Raises InvalidRequestError where it cannot listen."""
    with _listen(config.host, config.port) as listening:
        async with background_tasks() as tasks:
            connections = Connections(config.connect, config.server_key, config.idle_connection_s, tasks)
            app = build(Gateway(config, connections, BodyBudget(config.max_body_bytes, config.max_bytes_in_flight)))
            settings = uvicorn.Config(
                app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1
            )
            server = _Server(settings)
            tasks.start_soon(server.serve, [listening])
            host = f"[{config.host}]" if ":" in config.host else config.host
            try:
                yield f"http://{host}:{listening.getsockname()[1]}"
            finally:
                server.should_exit = True
                with anyio.CancelScope(shield=True), anyio.move_on_after(2):
                    await server.shutdown([listening])


def _listen(host: str, port: int) -> socket.socket:
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
