"""The broker: the shell around the pure parts. It owns the sockets, the store and the clock.

Two sockets are drained whenever they are readable; one commit covers all that arrived during the one before.
"""

import contextlib
import sqlite3
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path

import anyio
import anyio.lowlevel
import structlog
from anyio import to_thread
from anyio.abc import TaskGroup

from ..storage.connection import unusable
from ..storage.lock import sole_writer
from ..storage.reader import Reader
from ..storage.rows import CheckpointRow
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire import sockets
from ..wire.errors import ErrorInfo
from ..wire.ids import FutureId
from ..wire.sockets import Channel
from ..wire.tasks import background_tasks
from ..wire.types import AuditEvent
from .accepting import kept_costs
from .actor_door import ActorDoor
from .client_door import ClientDoor
from .client_post import SoFar
from .commands import Commands
from .config import BrokerConfig
from .planning.planner import Planner
from .registry import Registry
from .snapshotting import Snapshotting
from .sweeping import Sweeper

log = structlog.get_logger("lorry.broker")

_HOUSEKEEPING_S = 600.0
"""Between two times that what is over is cleared away."""
_UNREAD_AT_MOST = 16
"""Messages of one client that wait in memory to be read; the others wait where they come from."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the broker listens, with the ports that the system chose."""

    clients: str
    actors: str


@asynccontextmanager
async def running(config: BrokerConfig) -> AsyncGenerator[Addresses]:
    """A broker for as long as the block lasts. A failure of one of its tasks cancels the block and is raised."""
    frame_limit = 2 * config.max_payload_bytes
    with contextlib.ExitStack() as stack:
        announce = stack.enter_context(sole_writer(config.data))
        front = stack.enter_context(sockets.bind(config.bind, frame_limit, config.curve, _UNREAD_AT_MOST))
        back = stack.enter_context(sockets.bind(config.actor_bind, frame_limit, config.actor_curve))
        writing = stack.enter_context(contextlib.closing(await to_thread.run_sync(Store, config.data)))
        reading = stack.enter_context(contextlib.closing(await to_thread.run_sync(Store, config.data)))
        leisurely = stack.enter_context(contextlib.closing(await to_thread.run_sync(Store, config.data)))
        async with background_tasks() as tasks:
            broker = _Broker(config, front, back, writing, Reader(reading, leisurely), tasks)
            await to_thread.run_sync(_load, broker, writing, config.data)
            tasks.start_soon(broker.writer.run)
            tasks.start_soon(broker.serve_clients)
            tasks.start_soon(broker.serve_actors)
            tasks.start_soon(broker.dispatch)
            tasks.start_soon(broker.tell_news)
            tasks.start_soon(broker.keep_time)
            tasks.start_soon(broker.keep_deadlines)
            tasks.start_soon(broker.keep_house)
            tasks.start_soon(broker.sweeper.run)
            await to_thread.run_sync(announce, front.address)
            yield Addresses(front.address, back.address)


def _load(broker: "_Broker", store: Store, data: Path) -> None:
    """Raises JournalDamagedError for a database that is damaged, StorageUnavailableError where the disk refuses."""
    try:
        broker.load(store)
    except sqlite3.DatabaseError as error:
        raise unusable(data, error) from error


class _Broker:
    def __init__(
        self,
        config: BrokerConfig,
        front: Channel,
        back: Channel,
        writing: Store,
        reading: Reader,
        tasks: TaskGroup,
    ) -> None:
        self._config, self._front, self._back, self._tasks = config, front, back, tasks
        self._reader, self._work = reading, anyio.Event()
        self._alarm: float | None = None
        self._alarm_moved = anyio.Event()
        self.writer = Writer(writing)
        self._planner = Planner(config.spread_after_s, config.model_weights)
        self._registry = Registry(config.models, time.time)
        self.sweeper = Sweeper(config.checkpoints, self._registry, self.writer, time.time)
        self._commands = Commands(
            self._registry,
            self._planner,
            self.writer,
            config,
            time.time,
            self._deliver,
            self._work_arrived,
            self.sweeper,
            self._stream,
        )
        snapshots = Snapshotting(
            self._registry,
            self._planner,
            self.writer,
            config.checkpoints,
            time.time,
            self.sweeper.offer,
            self._commands.unsaved,
        )
        self.writer.on_commit = self._commands.counts.committed
        self._actors = ActorDoor(
            config,
            back,
            self._registry,
            self._planner,
            self._commands,
            snapshots,
            self.writer,
            reading,
            time.time,
            time.monotonic,
        )
        self._clients = ClientDoor(
            config,
            front,
            self._registry,
            self._commands,
            self.writer,
            reading,
            time.time,
            time.monotonic,
            tasks,
            self._actors.cancel,
            self._actors.drain,
            self._actors.start_drain,
            self.sweeper.drop,
        )

    def load(self, store: Store) -> None:
        with store.transaction():
            store.all_actors_ended(time.time())
            store.moved_to(self._config.checkpoints)
            store.storage_priced(self._config.prices.storage, time.time())
        for sampler in store.samplers():
            self._registry.add_sampler(sampler)
        for checkpoint in store.checkpoints():
            self._registry.add_checkpoint(checkpoint)
        self._clients.keyring.load(store)
        self._clients.catalogue.load(store)
        self._commands.accepting.load(store)
        self._commands.metrics.load(store)

    def _deliver(self, to: Iterable[bytes], future: FutureId, error: ErrorInfo | None, payload: bytes) -> bool:
        return self._clients.post.deliver(to, future, error, payload)

    def _stream(self, to: bytes, told: Iterable[tuple[FutureId, bytes]], so_far: SoFar) -> None:
        self._clients.post.stream(to, told, so_far)

    def _work_arrived(self) -> None:
        self._work.set()

    async def serve_clients(self) -> None:
        await self._drain(self._front, self._clients.receive, self.writer.room_for_requests)

    async def serve_actors(self) -> None:
        await self._drain(self._back, self._actors.receive, anyio.lowlevel.checkpoint)

    async def _drain(
        self, channel: Channel, handle: Callable[[list[bytes]], None], room: Callable[[], Awaitable[None]]
    ) -> None:
        while True:
            await room()
            for frames in await channel.receive():
                handle(frames)
            self._work.set()
            if self._commands.next_deadline() != self._alarm:
                self._alarm_moved.set()

    async def dispatch(self) -> None:
        while True:
            with anyio.move_on_after(self._planner.look_again_after(time.monotonic())):
                await self._work.wait()
            self._work = anyio.Event()
            await self.writer.room()
            self._planner.look_again_after(time.monotonic())
            await self._actors.dispatch()

    async def tell_news(self) -> None:
        await self._clients.following.run()

    async def keep_time(self) -> None:
        """Who fell silent."""
        while True:
            await anyio.sleep(self._config.heartbeat_s)
            self._clients.expire()
            self._actors.expire()
            self._commands.finishing.record_told()

    async def keep_deadlines(self) -> None:
        """End what its client wanted to be over by now."""
        while True:
            self._alarm, self._alarm_moved = self._commands.next_deadline(), anyio.Event()
            with anyio.move_on_after(inf if self._alarm is None else self._alarm - self._clients.steady_now()):
                await self._alarm_moved.wait()
            for future, actor in self._commands.late(self._clients.steady_now()):
                self._actors.cancel(actor, future)
            await anyio.lowlevel.checkpoint()

    async def keep_house(self) -> None:
        """What expired. It waits for the disk, which nobody else's time may depend on."""
        while True:
            await anyio.sleep(self._config.heartbeat_s)
            await self._clean()
            await anyio.sleep(_HOUSEKEEPING_S)

    async def _clean(self) -> None:
        now = time.time()
        before, read_before = now - self._config.result_ttl_s, now - self._config.read_result_ttl_s
        await self.writer.write_and_wait(lambda store: store.results_expired(before, read_before))
        await self.writer.write_and_wait(lambda store: store.blobs_swept())
        while await self.writer.write_and_wait(lambda store: store.give_back()):
            pass
        for checkpoint in self._registry.expired():
            self._forget(checkpoint)
        self.sweeper.want()
        if self._config.prices.storage:
            at = time.time()
            costs = await self._reader.read_at_leisure(lambda store: kept_costs(store, at))
            self._commands.meters.kept(costs, at)

    def _forget(self, checkpoint: CheckpointRow) -> None:
        self._registry.remove_checkpoint(checkpoint)
        now = time.time()
        did = AuditEvent(now, checkpoint.tenant, "expiry", "checkpoint_expired", checkpoint.path)

        def record(store: Store) -> None:
            store.checkpoint_deleted(checkpoint, now)
            if not checkpoint.ephemeral:
                store.audited(did)

        self.writer.write(record)
