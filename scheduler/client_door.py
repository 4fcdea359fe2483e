"""Where clients come in: every message of theirs is checked here, and answered with a result or a typed error."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial

import structlog
from anyio.abc import TaskGroup

from ..storage.reader import Reader
from ..storage.rows import CommandRow, KeyRow, RunRow, SamplerRow
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.admin_messages import Administer
from ..wire.catalogue_messages import CatalogueChange, CatalogueRequest, RevokeKey
from ..wire.client_messages import (
    Cancel,
    CommandArguments,
    CreateRun,
    CreateSampler,
    Drain,
    Failed,
    FromClient,
    Goodbye,
    Hello,
    ImportAdapter,
    Ping,
    Pong,
    Probe,
    Read,
    Refuse,
    RunCreated,
    SamplerCreated,
    Submit,
    Unknown,
    Watch,
)
from ..wire.codec import MAX_HEADER_BYTES, decode, encode
from ..wire.commands import CommandKind
from ..wire.errors import (
    AuthenticationError,
    CommandCancelledError,
    LorryError,
    StorageUnavailableError,
)
from ..wire.ids import ActorId, FutureId, LaneId, future_id
from ..wire.news import Follow, Unfollow
from ..wire.sequenced import stamp_of
from ..wire.sockets import Channel
from ..wire.types import AuditEvent
from .accepting import Request
from .access import permissions
from .access.keyring import Keyring, revoked
from .access.sessions import Session, Sessions
from .admission import Admission, timed
from .catalogue import Catalogue
from .client_post import ClientPost
from .client_results import ClientResults
from .commands import Commands
from .config import BrokerConfig
from .following import Following
from .open_commands import holders
from .orders import Orders
from .planning.limits import holders_of
from .reception import Bounds, Reception
from .registry import Registry
from .salvage import number_of, refusal_of

log = structlog.get_logger("lorry.broker")

_BYTES_PER_TOKEN = 32
"""A token of training data takes 13 to 25 bytes on the wire, so a claim below size / 32 is not believed."""


_NO_ARGUMENTS = CommandArguments()
_PACED = CreateRun | CreateSampler | CatalogueChange
"""Requests that have a pace, beside commands; but for the revoking of a key, which cannot wait."""
_WRITE = Submit | Refuse | CreateRun | CreateSampler | CatalogueChange


class ClientDoor:
    def __init__(
        self,
        config: BrokerConfig,
        channel: Channel,
        registry: Registry,
        commands: Commands,
        writer: Writer,
        reader: Reader,
        now: Callable[[], float],
        monotonic: Callable[[], float],
        tasks: TaskGroup,
        cancel_in_flight: Callable[[ActorId, FutureId], None],
        drain: Callable[[ActorId], Awaitable[None]],
        start_drain: Callable[[ActorId], None],
        drop: Callable[[str], Awaitable[None]],
    ) -> None:
        self._config, self._registry, self._commands = config, registry, commands
        self._writer, self._reader, self._now, self._monotonic = writer, reader, now, monotonic
        self._offset = now() - monotonic()
        self._tasks, self._cancel_in_flight = tasks, cancel_in_flight
        self._sessions, self._admission = (
            Sessions(),
            Admission(config, registry, commands.meters, commands.goes_on, now),
        )
        self.post = ClientPost(channel, self._sessions)
        self._results = ClientResults(registry, commands, reader, self.post, self._sessions, tasks)
        self.keyring = Keyring(writer, reader, now, commands.set_weight, commands.set_limits)
        self.following = Following(
            commands, self.post, self._sessions, lambda key: self.keyring.over(key) is not None, now, config.news_s
        )
        bounds, left = Bounds.of(config), self.following.left
        self.reception = Reception(self.keyring, self._sessions, self.post, writer, tasks, now, monotonic, bounds, left)
        self.catalogue = Catalogue(registry, commands, writer, reader, config.checkpoints, now, drop, self.keyring)
        self._creating = self.catalogue.creating
        commands.exposition.connected = lambda: len(self._sessions)
        self._orders = Orders(
            config.operator_key,
            config.data,
            commands.meters,
            self.post,
            self.keyring,
            self.catalogue,
            writer,
            reader,
            now,
            drain,
            start_drain,
            self._end_all_of,
            commands.newsroom,
        )

    def steady_now(self) -> float:
        """Unix seconds as they were at the start, and go on: deadlines do not come early when the clock is set."""
        return self._offset + self._monotonic()

    # In --------------------------------------------------------------------------------------------------------------

    def receive(self, frames: list[bytes]) -> None:
        """One message from a client, which may be the one that others waited for."""
        connection, *message = frames
        session = self._sessions.heard(connection, self._monotonic())
        if (stamp := stamp_of(message)) is None:
            self._read(connection, message)
        elif session is None or not session.link.is_of(stamp):
            self.post.bare(connection, Unknown(stamp.tag))
        else:
            for due in session.link.receive(stamp, message[1:]):
                self._read(connection, due)
            self._results.may_send(session)
            self.following.heard(session)

    def _read(self, connection: bytes, frames: list[bytes]) -> None:
        """Whatever is wrong with it is the sender's to know, and nobody else's."""
        header, *payloads = frames or [b""]
        try:
            message: FromClient = decode(header, FromClient, MAX_HEADER_BYTES)
        except LorryError as error:
            self._unreadable(connection, header, error)
            return
        try:
            if isinstance(message, Probe):
                self.post.answer(connection, message.request, self._commands.readiness())
            elif isinstance(message, Drain | ImportAdapter) or (
                isinstance(message, Administer) and message.operator_key
            ):
                self._tasks.start_soon(self._orders.obey, connection, message)
            elif isinstance(message, Hello):
                self.reception.hear(connection, message)
            elif session := self._sessions.at(connection):
                self._handle(session, message, payloads[0] if payloads else b"")
            else:
                self.post.bare(connection, Unknown())
        except LorryError as error:
            self.post.send(connection, Failed(getattr(message, "request", None), error.info))

    def _handle(self, session: Session, message: FromClient, payload: bytes) -> None:
        if over := self.keyring.over(session.key):
            self._turn_out(session, over)
            return
        permissions.check(session.key.scopes, message)
        if isinstance(message, _PACED) and not isinstance(message, RevokeKey):
            self._commands.meters.check_pace(holders_of(session.tenant, session.key.id), self._now())
        if self._writer.trouble is not None and isinstance(message, _WRITE):
            raise StorageUnavailableError(self._writer.trouble)
        match message:
            case Submit():
                self._submit(session, message, payload)
            case Refuse():
                self._refuse(session, message)
            case Watch():
                for future in message.futures:
                    self._results.watch(session, future)
            case Read():
                self._results.read(session, message.futures)
                self.post.answer(session.connection, message.request)
            case CreateRun():
                self._create_run(session, message)
            case CreateSampler():
                self._create_sampler(session, message)
            case Cancel():
                self._cancel(session, message)
            case Ping():
                session.link.beat([encode(Pong())])
            case Goodbye():
                self._leave(session)
            case Hello() | Probe() | Drain() | ImportAdapter():
                raise AssertionError("handled by receive")
            case Administer():
                self._tasks.start_soon(self._orders.administer, session, message)
            case Follow() | Unfollow():
                self.following.hear(session, message)
            case _:
                self._tasks.start_soon(self._catalogued, session, message, payload)

    # Commands --------------------------------------------------------------------------------------------------------

    def _submit(self, session: Session, submit: Submit, payload: bytes) -> None:
        lane = self._registry.lane(session.tenant, submit.lane)
        permissions.check_lane(session.key.scopes, submit.kind, of_sampler=isinstance(lane, SamplerRow))
        tokens, rows = max(1, submit.tokens, len(payload) // _BYTES_PER_TOKEN), max(1, submit.rows)
        prefix = _scoped(submit.prefix, lane)
        row = self._placed(lane, session, submit.seq, submit.kind, tokens, rows, submit.arguments, prefix)
        row = row if submit.traceparent is None else replace(row, traceparent=submit.traceparent)
        row = timed(row, submit.timeout_s, self.steady_now())
        request = self._request(session, submit.request)
        if not self._commands.waiters.is_open(row.future):
            waits_for_it = self._commands.waits_for_its_next(row.lane)
            self._admission.check_room(row, self._next_seq(lane), waits_for_it=waits_for_it)
        if isinstance(lane, RunRow):
            self._commands.meters.used(holders(row), row.lane, self._now())
        try:
            admitted = self._admission.admit(lane, row, len(payload), self._next_seq(lane))
        except LorryError as error:
            self._commands.accepting.refuse(row, payload, error.info, request)
        else:
            self._commands.accepting.accept(admitted, payload, request)

    def _refuse(self, session: Session, refuse: Refuse) -> None:
        lane = self._registry.lane(session.tenant, refuse.lane)
        permissions.check_lane(session.key.scopes, refuse.kind, of_sampler=isinstance(lane, SamplerRow))
        row = self._placed(lane, session, refuse.seq, refuse.kind)
        self._commands.accepting.refuse(row, None, refuse.error, self._request(session, refuse.request))

    def _placed(
        self,
        lane: RunRow | SamplerRow,
        session: Session,
        seq: int,
        kind: CommandKind,
        tokens: int = 0,
        rows: int = 0,
        arguments: CommandArguments = _NO_ARGUMENTS,
        prefix: tuple[str, ...] = (),
    ) -> CommandRow:
        """A command with a place in the order. Raises InvalidRequestError, TooManyWaitingError."""
        self._admission.check_place(lane, seq, self._next_seq(lane))
        lane_id = LaneId(lane.id)
        return CommandRow(
            key=session.key.id,
            project=lane.project,
            accepted_at=self._now(),
            future=future_id(lane_id, seq),
            lane=lane_id,
            seq=seq,
            kind=kind,
            tenant=session.tenant,
            base_model=lane.base_model,
            tokens=tokens,
            rows=rows,
            arguments=arguments,
            prefix=prefix,
        )

    def _next_seq(self, lane: RunRow | SamplerRow) -> int | None:
        return self._commands.next_seq(LaneId(lane.id)) if isinstance(lane, RunRow) else None

    def _request(self, session: Session, number: int) -> Request:
        def answer(error: LorryError | None) -> None:
            if error is None:
                self.post.answer(session.connection, number)
            else:
                self.post.send(session.connection, Failed(number, error.info))

        return Request(session.connection, answer)

    def _unreadable(self, connection: bytes, header: bytes, error: LorryError) -> None:
        """What can be read of a message that is wrong is enough to answer it, and to end its place in a run's order."""
        session = self._sessions.heard(connection, self._monotonic())
        try:
            if session and (over := self.keyring.over(session.key)):
                self._turn_out(session, over)
                return
            if refuse := refusal_of(header, error):
                # Not refused to who is not known: it says hello, and sends it again, and its place in the order ends.
                if session and self._writer.trouble is not None:
                    raise StorageUnavailableError(self._writer.trouble)
                self._refuse(session, refuse) if session else self.post.send(connection, Unknown())
                return
        except LorryError as worse:
            error = worse
        self.post.send(connection, Failed(number_of(header), error.info))

    def _cancel(self, session: Session, cancel: Cancel) -> None:
        lane = self._registry.lane(session.tenant, LaneId(cancel.future.rpartition(":")[0]))
        permissions.check_lane(session.key.scopes, "cancel", of_sampler=isinstance(lane, SamplerRow))
        error = CommandCancelledError(f"{cancel.future} was cancelled")
        if actor := self._commands.end(cancel.future, error):
            self._cancel_in_flight(actor, cancel.future)
        self.post.answer(session.connection, cancel.request)

    # Runs and samplers -----------------------------------------------------------------------------------------------

    def _create_run(self, session: Session, create: CreateRun) -> None:
        run, is_new = self._creating.run(session.tenant, session.key.id, create)
        if is_new:
            asking = holders_of(run.tenant, run.key, run.project)
            self._commands.meters.check_run(asking, run.lora.rank, run.base_model, self._now())
            self._commands.meters.used(asking, LaneId(run.id), self._now())
            self.catalogue.projects.made(run.tenant, run.project, session.key.id)
            self._commands.accepting.add_run(run)
            self._writer.write(lambda store: store.run_created(run))
            did = AuditEvent(run.created_at, run.tenant, session.key.id, "run_created", run.id)
            self._writer.write(lambda store: store.audited(did))
        self._answer_when_durable(session, create.request, RunCreated(run.id))

    def _create_sampler(self, session: Session, create: CreateSampler) -> None:
        sampler, is_new = self._creating.sampler(session.tenant, create)
        if is_new:
            asking = holders_of(sampler.tenant, session.key.id, sampler.project)
            self._commands.meters.check_model(asking, sampler.base_model)
            self.catalogue.projects.made(sampler.tenant, sampler.project, session.key.id)
            self._registry.add_sampler(sampler)
            self._writer.write(lambda store: store.sampler_created(sampler))
        self._answer_when_durable(session, create.request, SamplerCreated(sampler.id, sampler.base_model))

    # Questions -------------------------------------------------------------------------------------------------------

    async def _catalogued(self, session: Session, request: CatalogueRequest, payload: bytes) -> None:
        try:
            answer = await self.catalogue.answer(session, request, payload)
            self.post.answer(session.connection, request.request, answer)
        except LorryError as error:
            self.post.send(session.connection, Failed(request.request, error.info))
        else:
            if isinstance(request, RevokeKey) and (key := await self.keyring.find(request.api_key, session.tenant)):
                self._end_all_of([key])
                self._commands.newsroom.changed(session.tenant, "keys")

    # Out, and leaving ------------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """A client that was silent for three heartbeats is gone, if it was listened to; its futures stay."""
        for holder, near in self._commands.meters.near():
            log.warning("near a limit", holder=holder, limit=near)
            self._writer.write(
                partial(Store.record_event, kind="near a limit", subject=holder, detail=near, now=self._now())
            )
        if not self._writer.takes_requests:
            self._sessions.heard_all(self._monotonic())
        for session in self._sessions.all():
            if over := self.keyring.over(session.key):
                self._turn_out(session, over)
        for session in self._sessions.silent_since(self._monotonic() - 3 * self._config.heartbeat_s):
            log.info("session expired", session=session.id)
            self._leave(session)

    def _end_all_of(self, keys: Iterable[KeyRow]) -> None:
        """That were revoked: what they had opened, and what was asked for with them and is not over."""
        for key in keys:
            for session in self._sessions.revoke(key.hash):
                self._turn_out(session, revoked(key))
            for future, actor in self._commands.end_asked_with(key.id, revoked(key)):
                self._cancel_in_flight(actor, future)

    def _turn_out(self, session: Session, error: AuthenticationError) -> None:
        self.post.send(session.connection, Failed(None, error.info))
        self._leave(session)

    def _leave(self, session: Session) -> None:
        now = self._now()
        self._sessions.close(session.connection)
        self._commands.waiters.left(session.connection)
        self.following.left(session)
        self._writer.write(lambda store: store.session_ended(session.id, now))

    def _answer_when_durable(self, session: Session, request: int, payload: object) -> None:
        """What the answer speaks of is written already, or waits in the writer ahead of this."""
        self._writer.write(lambda _: None, lambda _: self.post.answer(session.connection, request, payload))


def _scoped(prefix: list[int], lane: RunRow | SamplerRow) -> tuple[str, ...]:
    """What is computed of a prompt is shared by those who sample from the same weights, or of one tenant from none."""
    if isinstance(lane, RunRow):
        return ()
    scope = lane.tenant if lane.folder is None else lane.folder
    return tuple(f"{scope}/{mark:x}" for mark in prefix)
