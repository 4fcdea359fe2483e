"""What `lorry broker`, `actor` and `gateway` run: one process each, until a signal or its supervisor's end stops it."""

import json
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import ModuleType
from typing import cast

import anyio
import structlog
from anyio.abc import TaskGroup

from lorry.actors import actor
from lorry.actors.config import ActorConfig
from lorry.gateway.config import GatewayConfig
from lorry.patience import when_the_disk_allows
from lorry.scheduler import broker
from lorry.scheduler.config import BrokerConfig
from lorry.serve import HEARTBEAT_VARIABLE
from lorry.wire.tasks import background_tasks
from lorry.wire.tracing import tracing

log = structlog.get_logger("lorry")


def _start_tracing(process: str) -> None:
    if problem := tracing.start(process):
        log.warning(problem)


async def run_broker(configured: Callable[[], BrokerConfig], supervised: bool) -> None:
    """`configured` may raise StorageUnavailableError, and is called again then: the keys lie in the data folder."""

    _start_tracing("lorry-broker")

    async def serve() -> None:
        async with AsyncExitStack() as stack:

            async def start() -> tuple[BrokerConfig, broker.Addresses]:
                config = configured()
                return config, await stack.enter_async_context(broker.running(config))

            config, addresses = await when_the_disk_allows(start)
            announcement = {"clients": addresses.clients, "actors": addresses.actors}
            if keys := config.curve or config.actor_curve:
                announcement["server_key"] = keys.public.decode()
            announce(announcement)
            await anyio.sleep_forever()

    await _until_stopped(serve, supervised)


async def run_actor(config: ActorConfig, supervised: bool) -> None:
    _start_tracing("lorry-actor")
    joined, leaving = anyio.Event(), anyio.Event()

    def ready() -> None:
        joined.set()
        announce({"actor": config.actor})

    def leave() -> bool:
        if leaving.is_set() or not joined.is_set():
            return False
        leaving.set()
        return True

    await _until_stopped(lambda: actor.serve(config, ready, leaving), supervised, leave)


async def run_gateway(configured: Callable[[], GatewayConfig], supervised: bool) -> None:
    """`configured` as for the broker."""
    # The Tinker SDK's wire types do without torch where it is missing, and so do we: it is 180 MB and two seconds.
    _start_tracing("lorry-gateway")
    sys.modules["torch"] = cast(ModuleType, None)  # None is Python's own sign that an import is to fail
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say so, where a tokenizer is loaded
    from lorry.gateway import app

    async def configuration() -> GatewayConfig:
        return configured()

    async def serve() -> None:
        _allow_descriptors()
        async with app.running(await when_the_disk_allows(configuration)) as url:
            announce({"url": url, "http": url.partition("://")[2]})
            await anyio.sleep_forever()

    await _until_stopped(serve, supervised)


def _allow_descriptors() -> None:
    """As many as the system lets this process have: each connection is one, and what it has at first may be 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def announce(what: dict[str, str]) -> None:
    """One line on standard output, for the supervisor or whoever else started this process."""
    print(json.dumps(what), flush=True)


async def _until_stopped(
    serve: Callable[[], Awaitable[None]], supervised: bool, leave: Callable[[], bool] = lambda: False
) -> None:
    """`leave` is asked at each signal, and says whether `serve` will end by itself; otherwise it is cancelled."""
    os.umask(0o077)  # the database, checkpoints and keys are the service's alone
    os.environ["PYTHONSAFEPATH"] = "1"  # torch.compile starts Python, too: the working directory is not its code
    async with background_tasks() as tasks:
        if supervised:
            # A Ctrl-C reaches the whole foreground group; the supervisor decides what it means for its children.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            tasks.start_soon(_stop_on_signal, tasks, leave, signal.SIGTERM)
            tasks.start_soon(_stop_at_end_of_input, tasks)
            tasks.start_soon(_show_life, float(os.environ[HEARTBEAT_VARIABLE]))
        else:
            tasks.start_soon(_stop_on_signal, tasks, leave, signal.SIGTERM, signal.SIGINT)
        await serve()


async def _stop_on_signal(tasks: TaskGroup, leave: Callable[[], bool], *which: signal.Signals) -> None:
    with anyio.open_signal_receiver(*which) as signals:
        async for _ in signals:
            if not leave():
                tasks.cancel_scope.cancel()
                return


async def _show_life(every_s: float) -> None:
    while True:
        await anyio.sleep(every_s)
        print(flush=True)


async def _stop_at_end_of_input(tasks: TaskGroup) -> None:
    """The supervisor holds the other end of standard input and writes nothing: readable means that it is gone."""
    await anyio.wait_readable(sys.stdin.fileno())
    tasks.cancel_scope.cancel()
