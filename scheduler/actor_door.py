"""Where actors come in: hello, heartbeats, completions; and where micro-batches go out."""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import anyio
import structlog
from msgspec import structs

from ..storage.reader import Reader
from ..storage.rows import ActorRow
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.actor_messages import (
    VERSION,
    ActorHello,
    ActorLeaving,
    ActorLeft,
    ActorPing,
    ActorPong,
    ActorWelcome,
    CancelCommand,
    Completion,
    Expelled,
    FromActor,
    Item,
    LeaveNow,
    LoadFailed,
    Made,
    MicroBatch,
    Outcome,
    Retired,
    SnapshotFailed,
    SnapshotTaken,
    ToActor,
)
from ..wire.codec import MAX_HEADER_BYTES, decode, encode
from ..wire.errors import ActorDiedError, LorryError, NotFoundError
from ..wire.ids import ActorId, BatchId, FutureId, RunId, SessionId
from ..wire.sequenced import Link, stamp_of
from ..wire.sockets import Channel
from .commands import Commands
from .config import BrokerConfig
from .planning.lanes import Command
from .planning.planner import Plan, Planner
from .registry import Registry
from .snapshotting import Snapshotting

log = structlog.get_logger("lorry.broker")

_MAX_ACTOR_HEADER_BYTES = 64 * MAX_HEADER_BYTES
_REFUSED_AT_MOST = 1000
"""Connections of which it is remembered that the log tells of them: an intruder may make any number."""


@dataclass(slots=True)
class _Peer:
    id: ActorId
    base_model: str
    session: SessionId
    connection: bytes
    last_seen: float
    link: Link
    handed: dict[BatchId, int | None] = field(default_factory=dict)
    """Micro-batches until something of them is done: the place of each in the order of what was sent, None before."""
    gone: anyio.Event = field(default_factory=anyio.Event)
    died_of: str | None = None
    """Why it is gone; None for one that left in good order."""


class ActorDoor:
    def __init__(
        self,
        config: BrokerConfig,
        channel: Channel,
        registry: Registry,
        planner: Planner,
        commands: Commands,
        snapshots: Snapshotting,
        writer: Writer,
        reader: Reader,
        now: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._config, self._channel, self._registry = config, channel, registry
        self._planner, self._commands, self._writer, self._reader = planner, commands, writer, reader
        self._snapshots, self._now, self._monotonic = snapshots, now, monotonic
        self._peers: dict[bytes, _Peer] = {}
        self._gone = set[bytes]()
        """Connections of actors that were lost: a process has one, and says hello again only late."""
        self._refused: dict[bytes, None] = {}
        """In the order in which the log told of them."""

    def receive(self, frames: list[bytes]) -> None:
        """One message from an actor, which may be the one that others waited for."""
        connection, *message = frames
        peer = self._peers.get(connection)
        if (stamp := stamp_of(message)) is None:
            self._read(connection, message)
        elif peer is None or not peer.link.is_of(stamp):
            self._expel(connection, "the broker does not know this actor")
        else:
            peer.last_seen = self._monotonic()
            for due in peer.link.receive(stamp, message[1:]):
                self._read(connection, due)

    def _read(self, connection: bytes, frames: list[bytes]) -> None:
        """What cannot be read expels its sender: actors are our own code, or intruders."""
        header, *payloads = frames or [b""]
        try:
            message: FromActor = decode(header, FromActor, _MAX_ACTOR_HEADER_BYTES)
        except LorryError as error:
            self._expel(connection, str(error))
            return
        if isinstance(message, ActorHello):
            self._hello(connection, message)
            return
        if isinstance(message, LoadFailed):
            self._load_failed(connection, message)
            return
        peer = self._peers.get(connection)
        if peer is None:
            self._expel(connection, "the broker does not know this actor")
            return
        match message:
            case Completion():
                self._completed(peer, message, payloads)
            case Made():
                self._commands.made(message.futures, payloads, peer.id)
            case SnapshotTaken():
                self._snapshots.taken(message, peer.id, lambda recorded: self._send(peer, recorded))
            case SnapshotFailed():
                self._snapshots.failed(message)
            case ActorLeaving():
                self._planner.retire(peer.id)
                self._send(peer, Retired())
            case ActorLeft():
                self._lose(peer, "it left", "stopped")
            case ActorPing():
                peer.link.beat([encode(ActorPong())])
                self._commands.overview.measured(peer.id, message)
                self._writer.write(lambda store: store.actor_measured(peer.id, message))

    def _may_join(self, connection: bytes, hello: ActorHello | LoadFailed) -> bool:
        reason = None
        if hello.version != VERSION:
            reason = f"the actor speaks version {hello.version}, the broker {VERSION}"
        elif not secrets.compare_digest(hello.token, self._config.actor_token):
            reason = "the actor's token is wrong"
        elif hello.base_model not in self._registry.models:
            reason = f"base model {hello.base_model!r} is not served here"
        if reason is not None:
            self._expel(connection, reason)
        return reason is None

    def _load_failed(self, connection: bytes, failed: LoadFailed) -> None:
        if self._may_join(connection, failed):
            log.error("a model cannot be loaded", base_model=failed.base_model, why=failed.error.message)
            self._registry.models.failed(failed.base_model, failed.error)
            now, why = self._now(), failed.error.message
            self._writer.write(lambda store: store.record_event("load failed", failed.actor, why, now))

    def _hello(self, connection: bytes, hello: ActorHello) -> None:
        if not self._may_join(connection, hello):
            return
        if (known := self._peers.get(connection)) and known.id == hello.actor:
            self._bare(connection, ActorWelcome(known.session, self._config.heartbeat_s))
            return
        if connection in self._gone:
            self._expel(connection, "this actor was lost before")
            return
        for earlier in [peer for peer in self._peers.values() if peer.id == hello.actor]:
            self._lose(earlier, "it was replaced")
        session = SessionId("actor-session-" + secrets.token_hex(8))
        link = Link(lambda frames: self._channel.send([connection, *frames]), session)
        self._refused.pop(connection, None)
        self._peers[connection] = _Peer(hello.actor, hello.base_model, session, connection, self._monotonic(), link)
        self._registry.models.seen(hello.base_model, hello.facts, hello.capacity.max_rank)
        self._planner.add_actor(hello.actor, hello.base_model, hello.capacity, hello.device_id)
        row = ActorRow(
            id=hello.actor,
            base_model=hello.base_model,
            pid=hello.pid,
            device=hello.facts.device,
            dtype=hello.facts.dtype,
            slots=hello.capacity.slots,
            sample_share=hello.capacity.sample_share,
            state="ready",
            started_at=self._now(),
        )
        self._commands.overview.joined(row)
        self._commands.counts.actor_joined(hello.base_model)
        self._writer.write(lambda store: store.actor_started(row))
        self._bare(connection, ActorWelcome(session, self._config.heartbeat_s))
        log.info("actor ready", actor=hello.actor, base_model=hello.base_model, pid=hello.pid)

    def _completed(self, peer: _Peer, completion: Completion, payloads: list[bytes]) -> None:
        for outcome, payload in zip(completion.outcomes, payloads, strict=True):
            self._commands.finish(outcome, payload, peer.id, completion.batch)
        for run, replay_s in completion.replay_s.items():
            self._snapshots.measured(RunId(run), replay_s)
        if completion.tokens_per_s > 0:
            self._planner.measured(peer.id, completion.tokens_per_s)
        if completion.done:
            peer.handed.pop(completion.batch, None)
            self._planner.batch_done(peer.id, completion.batch)

    # Out -------------------------------------------------------------------------------------------------------------

    async def dispatch(self) -> None:
        """Give every actor all the work it can take. What one takes may make work for another."""
        was_handed_out = True
        while was_handed_out:
            was_handed_out, spreads = False, self._planner.spreads
            for peer in list(self._peers.values()):
                while peer.connection in self._peers and (plan := self._planner.next_micro_batch(peer.id)):
                    await self._send_plan(peer, plan)
                    was_handed_out = len(self._peers) > 1
            was_handed_out |= self._planner.spreads > spreads

    async def _send_plan(self, peer: _Peer, plan: Plan) -> None:
        peer.handed[plan.batch] = None
        found: list[tuple[Command, Item, bytes]] = []
        for command in plan.commands:
            try:
                item = self._commands.item(command)
                payload = self._commands.payload(command)
                if isinstance(payload, str):
                    payload = await self._reader.read(partial(_payload, payload))
            except LorryError as error:
                self._commands.finish(Outcome(command.future, error.info), b"", peer.id, plan.batch)
                continue
            found.append((command, *self._commands.begun(item, payload)))
        # While payloads were read, a run may have been taken back, to be rebuilt from another state.
        held = [each for each in found if self._planner.is_in_flight(each[0].future, plan.batch)]
        if held:
            parents = self._commands.handed_out(peer.id, plan.mode, [command for command, *_ in held])
            items = [item for _, item, _ in held]
            if parents:
                items = [structs.replace(item, traceparent=parents.get(item.future)) for item in items]
            batch = MicroBatch(plan.batch, plan.mode, items, plan.cost, plan.alone)
            peer.handed[plan.batch] = self._send(peer, batch, [payload for *_, payload in held])
        else:
            del peer.handed[plan.batch]
            self._planner.batch_done(peer.id, plan.batch)

    def cancel(self, actor: ActorId, future: FutureId) -> None:
        for peer in self._peers.values():
            if peer.id == actor:
                self._send(peer, CancelCommand(future))

    async def drain(self, actor: ActorId) -> None:
        """It is to leave, and has when this returns. Raises NotFoundError for one that is not there, ActorDiedError for
        one that was lost before it had left."""
        peer = self._told_to_leave(actor)
        await peer.gone.wait()
        if peer.died_of is not None:
            raise ActorDiedError(f"actor {actor!r} was lost before it had left: {peer.died_of}", field="actor")

    def start_drain(self, actor: ActorId) -> None:
        """It is to leave. Raises NotFoundError for one that is not there."""
        self._told_to_leave(actor)

    def _told_to_leave(self, actor: ActorId) -> _Peer:
        peer = next((peer for peer in self._peers.values() if peer.id == actor), None)
        if peer is None:
            there = ", ".join(peer.id for peer in self._peers.values()) or "none"
            raise NotFoundError(f"there is no actor {actor!r}; there are: {there}", field="actor")
        self._send(peer, LeaveNow())
        return peer

    # Leaving ---------------------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """An actor that was silent for three heartbeats is gone."""
        for peer in [p for p in self._peers.values() if p.last_seen < self._monotonic() - 3 * self._config.heartbeat_s]:
            self._bare(peer.connection, Expelled("the actor was silent for three heartbeats"))
            self._lose(peer, "it was silent for three heartbeats")

    def _lose(self, peer: _Peer, why: str, state: Literal["lost", "stopped"] = "lost") -> None:
        tell = log.warning if state == "lost" else log.info
        tell(f"actor {state}", actor=peer.id, why=why)
        del self._peers[peer.connection]
        self._commands.counts.actor_ended(peer.base_model, state)
        self._commands.overview.left(peer.id)
        self._gone.add(peer.connection)
        peer.died_of = why if state == "lost" else None
        peer.gone.set()
        now = self._now()
        self._writer.write(lambda store: store.actor_ended(peer.id, state, now))
        self._writer.write(lambda store: store.record_event(f"actor {state}", peer.id, why, now))
        unread = {n for n, place in peer.handed.items() if place is None or not peer.link.is_confirmed(place)}
        self._commands.actor_lost(peer.id, self._planner.actor_lost(peer.id, unread))

    def _expel(self, connection: bytes, reason: str) -> None:
        self._tell_refused(connection, reason)
        if peer := self._peers.get(connection):
            self._lose(peer, reason)
        self._bare(connection, Expelled(reason))

    def _tell_refused(self, connection: bytes, reason: str) -> None:
        """Once: an actor says hello until somebody hears it."""
        if connection in self._refused:
            return
        log.warning("actor refused", reason=reason)
        self._refused[connection] = None
        if len(self._refused) > _REFUSED_AT_MOST:
            del self._refused[next(iter(self._refused))]

    def _send(self, peer: _Peer, message: ToActor, payloads: Iterable[bytes] = ()) -> int:
        return peer.link.send([encode(message), *payloads])

    def _bare(self, connection: bytes, message: ToActor) -> None:
        self._channel.send([connection, encode(message)])


def _payload(future: FutureId, store: Store) -> bytes:
    return store.payload(future)
