"""Where clients come in: every message of theirs is checked here, and answered with a result or a typed error."""

import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog
from anyio import to_thread
from anyio.abc import TaskGroup

from ..storage.checkpoints import delete_folder
from ..storage.reader import Reader
from ..storage.rows import CheckpointRow, CommandRow, RunRow, SamplerRow
from ..storage.writer import Writer
from ..wire.client_messages import (
    VERSION,
    Answer,
    Cancel,
    CreateRun,
    CreateSampler,
    DeleteCheckpoint,
    Failed,
    FromClient,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Query,
    Resolved,
    RunCreated,
    SamplerCreated,
    SamplerInfo,
    Submit,
    ToClient,
    Unknown,
    Watch,
    Welcome,
)
from ..wire.codec import MAX_HEADER_BYTES, decode, encode
from ..wire.commands import MAX_SEQ, SAMPLING_KINDS, check_lora_config
from ..wire.errors import (
    AuthenticationError,
    ErrorInfo,
    InvalidRequestError,
    LorryError,
    MessageTooLargeError,
    NotFoundError,
    ProtocolError,
)
from ..wire.ids import ActorId, FutureId, LaneId, RunId, SamplerId, SessionId, TenantId, future_id
from ..wire.sockets import Channel
from ..wire.types import (
    Checkpoint,
    GetInfoResponse,
    GetServerCapabilitiesResponse,
    LoraConfig,
    SupportedModel,
    TrainingRun,
)
from .commands import Commands
from .config import BrokerConfig
from .registry import Registry, checkpoint_path
from .sessions import Session, Sessions

log = structlog.get_logger("lorry.broker")

_BYTES_PER_TOKEN = 32
"""A token of training data takes 13 to 25 bytes on the wire, so a claim below size / 32 is not believed."""


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
    ) -> None:
        self._config, self._channel, self._registry, self._commands = config, channel, registry, commands
        self._writer, self._reader, self._now, self._monotonic = writer, reader, now, monotonic
        self._tasks, self._cancel_in_flight = tasks, cancel_in_flight
        self._sessions = Sessions()

    # In --------------------------------------------------------------------------------------------------------------

    def receive(self, frames: list[bytes]) -> None:
        """One message from a client; whatever is wrong with it is the sender's to know, and nobody else's."""
        connection, header, *payloads = frames if len(frames) > 1 else [*frames, b""]
        request = None
        try:
            message: FromClient = decode(header, FromClient, MAX_HEADER_BYTES)
            request = getattr(message, "request", None)
            if isinstance(message, Hello):
                self._tasks.start_soon(self._hello, connection, message)
            elif session := self._sessions.heard(connection, self._monotonic()):
                self._handle(session, message, payloads[0] if payloads else b"")
            else:
                self._send(connection, Unknown())
        except LorryError as error:
            self._send(connection, Failed(request, error.info))

    async def _hello(self, connection: bytes, hello: Hello) -> None:
        tenant = await self._reader.read(lambda store: store.tenant_of(hello.api_key))
        if hello.version != VERSION:
            problem = f"the client speaks version {hello.version} of the protocol, the broker version {VERSION}"
            self._send(connection, Failed(None, ProtocolError(problem, field="version").info))
        elif tenant is None:
            shown = f"{hello.api_key[:8]}…" if hello.api_key else "empty"
            error = AuthenticationError(f"api_key is {shown}, which is no key of this server", field="api_key")
            self._send(connection, Failed(None, error.info))
        else:
            self._welcome(connection, tenant, hello.client)

    def _welcome(self, connection: bytes, tenant: TenantId, client: str) -> None:
        session = Session(SessionId("session-" + secrets.token_hex(8)), tenant, connection, self._monotonic())
        now = self._now()
        if earlier := self._sessions.open(session):
            self._writer.write(lambda store: store.session_ended(earlier.id, now), _nothing)
        self._writer.write(lambda store: store.session_started(session.id, tenant, client[:200], now), _nothing)
        self._send(connection, Welcome(session.id, self._config.heartbeat_s, self._config.max_payload_bytes))

    def _handle(self, session: Session, message: FromClient, payload: bytes) -> None:
        match message:
            case Submit():
                self._submit(session, message, payload)
            case Watch():
                for future in message.futures:
                    self._watch(session, future)
            case CreateRun():
                self._create_run(session, message)
            case CreateSampler():
                self._create_sampler(session, message)
            case Cancel():
                self._cancel(session, message)
            case Query():
                self._tasks.start_soon(self._query, session, message)
            case DeleteCheckpoint():
                self._delete_checkpoint(session, message)
            case Ping():
                self._send(session.connection, Pong())
            case Goodbye():
                self._leave(session)
            case Hello():
                raise AssertionError("handled by receive")

    # Commands --------------------------------------------------------------------------------------------------------

    def _submit(self, session: Session, submit: Submit, payload: bytes) -> None:
        lane = self._registry.lane(session.tenant, submit.lane)
        self._check_submit(lane, submit, payload)
        row = CommandRow(
            future=future_id(submit.lane, submit.seq),
            lane=submit.lane,
            seq=submit.seq,
            kind=submit.kind,
            tenant=session.tenant,
            base_model=lane.base_model,
            tokens=max(1, submit.tokens, len(payload) // _BYTES_PER_TOKEN),
            rows=max(1, submit.rows),
            arguments=submit.arguments,
        )
        self._commands.accept(row, payload, session.connection, lambda: self._answer(session, submit.request))

    def _check_submit(self, lane: RunRow | SamplerRow, submit: Submit, payload: bytes) -> None:
        if len(payload) > self._config.max_payload_bytes:
            raise MessageTooLargeError(f"payload has {len(payload):,} bytes, limit {self._config.max_payload_bytes:,}")
        if not 0 <= submit.seq < MAX_SEQ:
            raise InvalidRequestError.of("seq", submit.seq, "a whole number from 0 to 2**53")
        if (submit.kind in SAMPLING_KINDS) != isinstance(lane, SamplerRow):
            raise InvalidRequestError.of("kind", submit.kind, f"a command of a {type(lane).__name__[:-3].lower()}")
        if submit.kind in SAMPLING_KINDS and not 0 <= submit.rows <= 1024:
            raise InvalidRequestError.of("rows", submit.rows, "a whole number from 0 to 1024")
        ttl = submit.arguments.ttl_seconds
        if ttl is not None and ttl < 1:
            raise InvalidRequestError.of("ttl_seconds", ttl, "a whole number from 1, or None for ever")
        if isinstance(lane, SamplerRow):
            return
        ahead = submit.seq - self._commands.next_seq(LaneId(lane.id))
        if ahead > self._config.max_waiting:
            raise InvalidRequestError.of("seq", submit.seq, f"at most {self._config.max_waiting} ahead of what has run")
        if submit.kind == "save_state":
            checkpoint_path(lane.id, "training", submit.arguments.name)
        elif submit.kind == "save_weights_for_sampler":
            checkpoint_path(lane.id, "sampler", submit.arguments.name)
        elif submit.kind == "load_state":
            self._registry.loadable(lane, submit.arguments.path)

    def _watch(self, session: Session, future: FutureId) -> None:
        try:
            self._registry.lane(session.tenant, LaneId(future.rpartition(":")[0]))
        except NotFoundError:
            self._send(session.connection, Resolved(future, NotFoundError(f"there is no future {future!r}").info))
            return
        if self._commands.waiters.is_open(future):
            self._commands.waiters.watch(future, session.connection)
        else:
            self._tasks.start_soon(self._look_up, session, future)

    async def _look_up(self, session: Session, future: FutureId) -> None:
        result = await self._reader.read(lambda store: store.result(future))
        if result is None:
            self._send(session.connection, Resolved(future, NotFoundError(f"there is no future {future!r}").info))
        else:
            self._commands.tell([session.connection], future, result.error, result.payload)

    def _cancel(self, session: Session, cancel: Cancel) -> None:
        self._registry.lane(session.tenant, LaneId(cancel.future.rpartition(":")[0]))
        if actor := self._commands.cancel(cancel.future):
            self._cancel_in_flight(actor, cancel.future)
        self._answer(session, cancel.request)

    def deliver(self, connections: Iterable[bytes], future: FutureId, error: ErrorInfo | None, payload: bytes) -> None:
        header = encode(Resolved(future, error))
        for connection in connections:
            self._channel.send([connection, header, payload])

    # Runs and samplers -----------------------------------------------------------------------------------------------

    def _create_run(self, session: Session, create: CreateRun) -> None:
        if run := self._registry.made_before(session.tenant, create.nonce):
            self._answer_when_durable(session, create.request, RunCreated(run.id))
            return
        _, max_rank = self._registry.facts(create.base_model)
        check_lora_config(create.lora, max_rank)
        seed = create.lora.seed if create.lora.seed is not None else secrets.randbits(63)
        lora = LoraConfig(
            rank=create.lora.rank,
            seed=seed,
            train_mlp=create.lora.train_mlp,
            train_attn=create.lora.train_attn,
            train_unembed=create.lora.train_unembed,
        )
        now = self._now()
        run = RunRow(
            id=RunId("run-" + secrets.token_hex(8)),
            tenant=session.tenant,
            nonce=create.nonce,
            base_model=create.base_model,
            lora=lora,
            user_metadata=create.user_metadata,
            created_at=now,
            last_request_at=now,
        )
        self._commands.add_run(run)
        created = RunCreated(run.id)
        self._writer.write(lambda store: store.run_created(run), lambda: self._answer(session, create.request, created))

    def _create_sampler(self, session: Session, create: CreateSampler) -> None:
        if known := self._registry.made_before(session.tenant, create.nonce):
            self._answer_when_durable(session, create.request, SamplerCreated(known.id, known.base_model))
            return
        if (create.base_model is None) == (create.model_path is None):
            raise InvalidRequestError("give exactly one of base_model and model_path", field="model_path")
        base_model = create.base_model or ""
        if create.model_path is not None:
            checkpoint = self._registry.checkpoint(session.tenant, create.model_path, "sampler")
            base_model = self._registry.run(session.tenant, checkpoint.run).base_model
        self._registry.facts(base_model)
        sampler = SamplerRow(
            id=SamplerId("sampler-" + secrets.token_hex(8)),
            tenant=session.tenant,
            nonce=create.nonce,
            base_model=base_model,
            model_path=create.model_path,
            created_at=self._now(),
        )
        self._registry.add_sampler(sampler)
        created = SamplerCreated(sampler.id, base_model)
        self._writer.write(
            lambda store: store.sampler_created(sampler), lambda: self._answer(session, create.request, created)
        )

    def _delete_checkpoint(self, session: Session, delete: DeleteCheckpoint) -> None:
        checkpoint = self._registry.checkpoint(session.tenant, delete.path)

        async def remove_and_answer() -> None:
            await self.remove_checkpoint(checkpoint)
            self._answer(session, delete.request)

        self._tasks.start_soon(remove_and_answer)

    async def remove_checkpoint(self, checkpoint: CheckpointRow) -> None:
        """Forget it, and delete its folder unless a run still needs it to be rebuilt from."""
        self._registry.remove_checkpoint(checkpoint.path)
        await self._writer.write_and_wait(lambda store: store.checkpoint_deleted(checkpoint.path))
        run = self._registry.run_of(LaneId(checkpoint.run))
        if run is None or run.restore_folder != checkpoint.folder:
            await to_thread.run_sync(delete_folder, self._config.checkpoints, Path(checkpoint.folder))

    # Questions -------------------------------------------------------------------------------------------------------

    async def _query(self, session: Session, query: Query) -> None:
        try:
            self._answer(session, query.request, await self._look(session.tenant, query))
        except LorryError as error:
            self._send(session.connection, Failed(query.request, error.info))

    async def _look(self, tenant: TenantId, query: Query) -> object:
        match query.what:
            case "capabilities":
                models = self._registry.ready_models().items()
                return GetServerCapabilitiesResponse(
                    [SupportedModel(name, facts.max_context) for name, facts in models]
                )
            case "run":
                run = self._registry.run(tenant, query.subject)
                facts, _ = self._registry.facts(run.base_model)
                return GetInfoResponse(run.id, run.base_model, run.lora.rank, facts.tokenizer_id)
            case "sampler":
                sampler = self._registry.sampler(tenant, query.subject)
                facts, _ = self._registry.facts(sampler.base_model)
                return SamplerInfo(sampler.id, sampler.base_model, facts.tokenizer_id)
            case "runs":
                return [_training_run(run) for run in self._registry.runs_of(tenant)]
            case "checkpoints":
                run = self._registry.run(tenant, query.subject).id if query.subject else None
                return [_checkpoint(row) for row in self._registry.checkpoints_of(tenant, run)]
            case "usage":
                return await self._reader.read(lambda store: store.usage(tenant))

    # Out, and leaving ------------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """A client that was silent for three heartbeats is gone; its futures stay."""
        for session in self._sessions.silent_since(self._monotonic() - 3 * self._config.heartbeat_s):
            log.info("session expired", session=session.id)
            self._leave(session)

    def _leave(self, session: Session) -> None:
        now = self._now()
        self._sessions.close(session.connection)
        self._commands.waiters.left(session.connection)
        self._writer.write(lambda store: store.session_ended(session.id, now), _nothing)

    def _answer(self, session: Session, request: int, payload: object = None) -> None:
        self._channel.send([session.connection, encode(Answer(request)), b"" if payload is None else encode(payload)])

    def _answer_when_durable(self, session: Session, request: int, payload: object) -> None:
        """What the answer speaks of is written already, or waits in the writer ahead of this."""
        self._writer.write(lambda store: None, lambda: self._answer(session, request, payload))

    def _send(self, connection: bytes, message: ToClient) -> None:
        self._channel.send([connection, encode(message)])


def _training_run(run: RunRow) -> TrainingRun:
    return TrainingRun(
        training_run_id=run.id,
        base_model=run.base_model,
        model_owner=run.tenant,
        lora_rank=run.lora.rank,
        last_request_time=run.last_request_at,
        user_metadata=run.user_metadata or None,
    )


def _checkpoint(row: CheckpointRow) -> Checkpoint:
    segment = row.path.removeprefix(f"tinker://{row.run}/")
    return Checkpoint(segment, row.kind, row.created_at, row.path, row.size_bytes, row.expires_at)


def _nothing() -> None:
    pass
