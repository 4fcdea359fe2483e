"""One history, from its seed to its end: faults while the programs run, then peace, and then everything is answered."""

import itertools
import logging
import secrets
import shutil
import sqlite3
import tempfile
import traceback
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from unittest import mock

import anyio
import structlog
from anyio import to_thread
from anyio.abc import TaskGroup

from lorry.scheduler import broker, finishing
from lorry.scheduler.config import BrokerConfig
from lorry.scheduler.planning.prices import ModelPrices, Prices
from lorry.storage import journal
from lorry.storage.bills import verify
from lorry.storage.connection import FILE
from lorry.storage.store import Store
from lorry.wire import sockets
from lorry.wire.catalogue_messages import Query
from lorry.wire.codec import decode
from lorry.wire.ids import TenantId
from lorry.wire.types import UsageRow

from .checker import NEWEST_KEPT, USD_PER_MILLION
from .client import Client, Request
from .clock import Clock, NeverEndsError, VirtualLoop, run
from .disk import Memory, fresh, template_of
from .faulty import Faults
from .history import History
from .program import Program, Tenant
from .world import ACTORS, CLIENTS, MODEL, TOKEN, World

_TENANTS = ("ada", "bob", "cyd")
_PROGRAMS_S, _SETTLED_S = 150.0, 1500.0


class Stage:
    """What all histories share: an empty database with a key for each tenant, and a place for their folders."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lorry-sim-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        store = Store(self.folder)
        self.keys = {name: store.create_key(TenantId(name), 0.0) for name in _TENANTS}
        store.close()
        self.template = template_of(self.folder / FILE)

    def close(self) -> None:
        shutil.rmtree(self.folder)

    def play(self, seed: int) -> History:
        loop = VirtualLoop()
        folder = self.folder / "history"
        folder.mkdir()
        world = World(seed, loop, fresh(self.template), folder)
        try:
            with _substituted(world):
                run(loop, _history(world, self.keys))
        except NeverEndsError as error:
            world.note("never ends", why=str(error))
        finally:
            world.disk.gone()
            shutil.rmtree(folder)
        return world.history


@contextmanager
def _substituted(world: World) -> Generator[None]:
    """The edges of the world as the broker sees it."""
    chance = world.draws

    def connect(*_place: object, **_options: object) -> Memory:
        return world.disk

    def token_hex(n: int) -> str:
        return chance.randbytes(n).hex()

    with (
        mock.patch.object(broker, "time", Clock(world.loop)),
        mock.patch.object(sockets, "bind", world.network.bind),
        mock.patch.object(to_thread, "run_sync", world.in_thread),
        mock.patch.object(journal, "LARGE", 4 if world.flavour.files else journal.LARGE),
        mock.patch.multiple(finishing, NEWEST_KEPT=NEWEST_KEPT, ASKED_WITHIN_S=20.0),
        mock.patch.object(sqlite3, "connect", connect),
        mock.patch.multiple(secrets, token_hex=token_hex, token_bytes=chance.randbytes, randbits=chance.getrandbits),
    ):
        yield


async def _history(world: World, keys: dict[str, str]) -> None:
    world.note("flavour", flavour=world.flavour)
    tenants = [Tenant(name, keys[name]) for name in _TENANTS[: world.flavour.tenants]]
    numbers = itertools.count(1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_brokers, world)
        faults = Faults(world, tasks)
        faults.start_actors()
        with anyio.move_on_after(_PROGRAMS_S):
            async with anyio.create_task_group() as programs:
                programs.start_soon(faults.run)
                await _programs(world, tenants, numbers)
                programs.cancel_scope.cancel()
        await faults.peace()
        world.note("peace")
        with anyio.move_on_after(_SETTLED_S):
            for tenant in tenants:
                await _audited(world, tenant, numbers, tasks)
        world.note("over")
        tasks.cancel_scope.cancel()
    with closing(Store(world.folder)) as store:
        for finding in verify(store).findings:
            world.note("bill", finding=finding)
        for run in store.runs():
            points = store.run_metrics(run.id, None, 1_000_000).points
            world.note("numbers", run=run.id, points=[(point.source, point.step, point.values) for point in points])


async def _brokers(world: World) -> None:
    """One after another, on the same disk."""
    config = BrokerConfig(world.folder, (MODEL,), TOKEN, CLIENTS, ACTORS, heartbeat_s=world.heartbeat_s)
    config = replace(config, prices=Prices({MODEL: ModelPrices(**USD_PER_MILLION)}, 1.0))
    config = replace(config, spread_after_s=0.0 if world.flavour.spreads else inf)
    if world.flavour.reads:
        config = replace(config, waiting_bytes=0)
    while True:
        with anyio.CancelScope() as world.broker:
            try:
                async with broker.running(config):
                    world.note("broker up")
                    await anyio.sleep_forever()
            except Exception:
                world.crash("by itself")
                world.note("broke", trace=traceback.format_exc()[-1500:])
        world.disk.close()
        await world.pause(8.0)


async def _programs(world: World, tenants: list[Tenant], numbers: "itertools.count[int]") -> None:
    async with anyio.create_task_group() as users:
        for tenant in tenants:
            for i in range(world.chance.choice((1, 1, 2))):
                client = Client(world, tenant.name, tenant.key, f"{tenant.name}{i}".encode())
                users.start_soon(_user, world, client, Program(world, tenant, client, numbers), tenants)


async def _user(world: World, client: Client, program: Program, tenants: list[Tenant]) -> None:
    """Who vanishes leaves the rest of what it wanted to the audit."""
    async with anyio.create_task_group() as own:
        own.start_soon(client.live)
        if world.flavour.strangers:
            own.start_soon(program.intrude, tenants)
        if world.chance.random() < 0.15:
            own.start_soon(_vanish, world, client, own.cancel_scope)
        async with anyio.create_task_group() as work:
            work.start_soon(program.train)
            if world.chance.random() < 0.5:
                work.start_soon(program.sample)
        await client.all_resolved()
        own.cancel_scope.cancel()


async def _vanish(world: World, client: Client, work: anyio.CancelScope) -> None:
    await world.pause(60.0)
    client.vanish()
    work.cancel()


async def _audited(world: World, tenant: Tenant, numbers: "itertools.count[int]", tasks: TaskGroup) -> None:
    """One more client, that asks again for all that has no answer, and wants every result."""
    client = Client(world, tenant.name, tenant.key, f"{tenant.name}-audit".encode())
    tasks.start_soon(client.live)
    program = Program(world, tenant, client, numbers)
    for request in tenant.planned:
        if request.message.request not in tenant.sent:  # type: ignore[union-attr]
            program.send(request)
    for request in tenant.sent.values():
        if not request.answered.is_set():
            client.ask(request)
        elif request.code is None:
            client.watch_sent(request)
    await client.all_resolved()
    usage = client.ask(Request(Query(next(numbers), "usage")))
    await usage.answered.wait()
    for row in decode(usage.answer, list[UsageRow]):
        facts = {"run": row.run, "kind": row.kind, "tokens": row.tokens, "cost": round(row.cost_usd * 1e12)}
        world.note("usage", tenant=tenant.name, owner=row.tenant, **facts)
    world.note("audited", tenant=tenant.name)
