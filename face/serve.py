"""The supervisor: starts the broker and the actors as child processes, watches them, and starts again what dies.

A child watches its standard input and ends when it closes, so that nothing outlives the supervisor, however it ends.
"""

import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import structlog
from anyio.abc import ByteReceiveStream, Process, TaskGroup
from anyio.streams.buffered import BufferedByteReceiveStream

from lorry.addresses import check_exposure
from lorry.administration import administer
from lorry.arguments import arguments_of
from lorry.config import ServeConfig
from lorry.gateway.tls import certificate_of
from lorry.patience import when_the_disk_allows
from lorry.placement import PlacedActor, placed
from lorry.service import Service
from lorry.wire.admin_messages import CreateKey, KeyCreated, new_key_id
from lorry.wire.errors import LorryError, StorageUnavailableError
from lorry.wire.ids import TenantId
from lorry.wire.tasks import background_tasks

log = structlog.get_logger("lorry.serve")

CONFIGURATION_EXIT = 78
"""EX_CONFIG of sysexits.h: a child that ends so before it was ever ready would end so again, and is not restarted."""
_GRACE_S = 3.0
_SOON_S = 30.0
"""One that lived this long, ready, is started again at once when it dies."""
_STARTS_AT_MOST = 6
"""Of one that was never ready."""
_PAUSE_AT_MOST_S = 10.0
_BEATS_MISSED_AT_MOST = 4
HEARTBEAT_VARIABLE = "LORRY_HEARTBEAT_S"
"""How often a child is to show a sign of life: an empty line on its standard output."""
_MAX_LINE_BYTES = 64 * 1024
_SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""A child runs what is installed: `python -m` alone looks into the working directory first."""


class ChildFailedError(LorryError):
    """See the log lines above it."""


@dataclass(slots=True)
class _Child:
    """One place for a process. `ready` is set for good once one was ready to work; `announcement` holds what it printed
    then, and `ready_at` is when the present one did. One that `is_leaving` is not started again; `gone` is set when it
    has ended. One that died before what it `needs` was ready found nobody to join, and that is not its fault."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    heartbeat_s: float
    is_actor: bool = False
    needs: "_Child | None" = None
    process: Process | None = None
    ready: anyio.Event = field(default_factory=anyio.Event)
    ready_at: float | None = None
    is_leaving: bool = False
    gone: anyio.Event = field(default_factory=anyio.Event)
    announcement: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A running deployment: where clients connect, with which CURVE key, and its processes.

    `url` is where those of the Tinker SDK connect.
    """

    address: str
    data: Path
    server_key: str | None
    children: Sequence[_Child]
    url: str | None = None

    async def create_key(self, tenant: str) -> str:
        """A new API key of `tenant`, who is made if new."""
        order = CreateKey(new_key_id(), TenantId(tenant))
        service = Service(self.address, self.server_key, self.data)
        return (await administer(service, order, KeyCreated)).api_key


@asynccontextmanager
async def serving(config: ServeConfig) -> AsyncGenerator[Deployment]:
    """A deployment for as long as the block lasts; it begins once every actor is ready. At its end actors finish what
    they hold and save their runs, for `grace_s` at the most.

    Raises InvalidRequestError as `placed` does, and where HTTP is to be what it cannot, and ChildFailedError where a
    process never gets ready. One that once was is started again for ever, and a disk that refuses what a start needs is
    waited for.
    """
    environment = {"LORRY_ACTOR_TOKEN": secrets.token_hex(16)}
    placed(config)  # what is wrong with it is told before anything starts
    for model in config.models:
        model.check_there()
    if config.http is not None:
        check_exposure(config.http, config.http_settings)
        certificate_of(config.http_settings)
    try:
        # Actors load for seconds: theirs is an address that is known before the broker is there.
        with await when_the_disk_allows(_temporary_folder) as private:
            actor_address = f"ipc://{private}/actors"
            async with background_tasks() as tasks:
                deployment = await _start(tasks, config, actor_address, environment)
                try:
                    yield deployment
                finally:
                    with anyio.CancelScope(shield=True):
                        await _retire(deployment.children, config.grace_s)
    except* ChildFailedError as failures:
        raise failures.exceptions[0] from None


async def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory(prefix="lorry-")
    except OSError as error:
        raise StorageUnavailableError(f"no temporary folder can be made: {error}") from error


async def _start(tasks: TaskGroup, config: ServeConfig, actor_address: str, environment: dict[str, str]) -> Deployment:
    """Starts all children, side by side where one does not need the other, and waits until each is ready."""
    broker = _Child("broker", _broker_command(config, config.bind, actor_address), environment, config.heartbeat_s)
    actors = [
        _Child(
            actor.name,
            _actor_command(config, actor, actor_address),
            environment,
            config.heartbeat_s,
            is_actor=True,
            needs=broker,
        )
        for actor in placed(config)
    ]
    for child in (broker, *actors):
        tasks.start_soon(_keep_alive, child)
    await broker.ready.wait()
    announced = broker.announcement  # a restarted broker must be found where the first one was
    broker.command = _broker_command(config, announced["clients"], actor_address)
    gateways = (
        [_Child("gateway", _gateway_command(config, config.http, announced), {}, config.heartbeat_s)]
        if config.http
        else []
    )
    for gateway in gateways:
        tasks.start_soon(_keep_alive, gateway)
    for child in (*actors, *gateways):
        await child.ready.wait()
    for gateway in gateways:  # its clients must find a restarted one, too
        gateway.command = _gateway_command(config, gateway.announcement["http"], announced)
    url = gateways[0].announcement["url"] if gateways else None
    children = [broker, *actors, *gateways]
    return Deployment(announced["clients"], config.data, announced.get("server_key"), children, url)


async def _retire(children: Sequence[_Child], grace_s: float) -> None:
    """Actors that are ready are asked to leave, while the broker is still there to hear what they have to say."""
    if grace_s == 0:
        return
    for child in children:
        if child.is_actor and child.process and child.ready_at is not None:
            child.is_leaving = True
            child.process.send_signal(signal.SIGTERM)
    with anyio.move_on_after(grace_s):
        for child in children:
            if child.is_leaving:
                await child.gone.wait()


async def _keep_alive(child: _Child) -> None:
    """Run the child until cancelled, again and again, with a pause that grows to a bound while it dies soon."""
    deaths = 0
    while True:
        child.ready_at = None
        code = await _run(child)
        if child.is_leaving:
            child.gone.set()
            return
        lived_s = 0.0 if child.ready_at is None else anyio.current_time() - child.ready_at
        deaths = deaths + 1 if lived_s < _SOON_S else 1
        if not child.ready.is_set():
            if code == CONFIGURATION_EXIT:
                raise ChildFailedError(f"{child.name} cannot start")
            if child.needs and not child.needs.ready.is_set():
                await child.needs.ready.wait()
                deaths = 0
                continue
            if deaths == _STARTS_AT_MOST:
                raise ChildFailedError(f"{child.name} ended {deaths} times before it was ready")
        pause_s = min(deaths - 1, _PAUSE_AT_MOST_S)
        log.warning("process ended", name=child.name, code=code, restarts_in_s=pause_s)
        await anyio.sleep(pause_s)


async def _run(child: _Child) -> int:
    """One process from start to end; cancelled, it is asked to stop, and killed where it does not within seconds."""
    process = await anyio.open_process(
        [sys.executable, "-m", "lorry", *child.command],
        stderr=None,
        env=os.environ | child.environment | _SAFE_PATH | {HEARTBEAT_VARIABLE: str(child.heartbeat_s)},
    )
    child.process = process
    try:
        assert process.stdout is not None
        output = BufferedByteReceiveStream(process.stdout)
        try:
            while not (line := (await output.receive_until(b"\n", _MAX_LINE_BYTES)).strip()):
                pass  # a sign of life: it is not ready yet
            child.announcement, child.ready_at = json.loads(line), anyio.current_time()
            child.ready.set()
            await _watch(child, process, process.stdout)
        except (anyio.IncompleteRead, anyio.EndOfStream):
            pass  # it ended before it was ready
        return await process.wait()
    finally:
        child.process = None
        with anyio.CancelScope(shield=True):
            await _stop(process)


async def _watch(child: _Child, process: Process, output: ByteReceiveStream) -> None:
    """Until the output ends. One that shows no sign of life is killed: it is stopped, or hangs."""
    silent = 0
    while silent < _BEATS_MISSED_AT_MOST:
        with anyio.move_on_after(child.heartbeat_s) as waiting:
            await output.receive()
            silent = 0
        silent += waiting.cancelled_caught
    log.error("process shows no sign of life and is killed", name=child.name)
    process.kill()


async def _stop(process: Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        with anyio.move_on_after(_GRACE_S):
            await process.wait()
        if process.returncode is None:
            process.kill()
    await process.aclose()


def _broker_command(config: ServeConfig, bind: str, actor_bind: str) -> list[str]:
    names = [argument for model in config.models for argument in ("--model", model.name)]
    command = ["--log-level", config.log_level, "broker", *names, "--data", str(config.data)]
    command += ["--bind", bind, "--actor-bind", actor_bind, "--heartbeat-s", str(config.heartbeat_s), "--supervised"]
    command += ["--spread-after-s", str(config.spread_after_s)]
    command += [
        word for name, weight in config.model_weights.items() for word in ("--model-weight", f"{name}={weight}")
    ]
    command += ["--sessions-per-tenant", str(config.sessions_per_tenant)]
    if config.prices:
        command += ["--prices", config.prices]
    return command


def _gateway_command(config: ServeConfig, http: str, announced: Mapping[str, str]) -> list[str]:
    options = ["--connect", announced["clients"], "--http", http, "--data", str(config.data)]
    options += arguments_of(config.http_settings)
    if key := announced.get("server_key"):
        options += ["--server-key", key]
    return ["--log-level", config.log_level, "gateway", *options, "--supervised"]


def _actor_command(config: ServeConfig, actor: PlacedActor, connect: str) -> list[str]:
    model = f"{actor.model.name}={actor.model.source}"
    options = ["--name", actor.name, "--model", model, "--connect", connect, *arguments_of(actor.settings)]
    return ["--log-level", config.log_level, "actor", *options, "--supervised"]
