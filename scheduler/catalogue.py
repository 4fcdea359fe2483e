"""What clients ask about and change beside commands: client sessions, samplers' clients, checkpoints, usage.

It decides who may see and do what; what it changes is durable before it answers.
"""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import anyio
from anyio import to_thread

from ..storage.audit import OPERATOR
from ..storage.reader import Reader
from ..storage.reports import usage, usage_between
from ..storage.rows import CheckpointRow, ClientSessionRow, RunRow
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.catalogue_messages import (
    AuditBetween,
    CatalogueRequest,
    CheckpointCopied,
    ClientSessionCreated,
    CompletedSince,
    Completions,
    CopyCheckpoint,
    CountClientEvents,
    CreateClientSession,
    DeleteCheckpoint,
    ExpireCheckpoint,
    FinishClientSession,
    FutureState,
    JoinSampler,
    LaneState,
    MintToken,
    PublishCheckpoint,
    Query,
    QueueState,
    RevokeKey,
    SamplerInfo,
    SamplerJoined,
    TouchClientSession,
    UsageBetween,
)
from ..wire.client_messages import AdapterImported, ImportAdapter
from ..wire.errors import InvalidRequestError, NotFoundError
from ..wire.ids import LaneId, TenantId
from ..wire.types import (
    AuditEvent,
    Checkpoint,
    ClientSession,
    GetInfoResponse,
    GetServerCapabilitiesResponse,
    SupportedModel,
    TrainingRun,
    WeightsInfo,
)
from .access.administration import info_of, no_tenant
from .access.keyring import Keyring
from .access.sessions import Session
from .client_sessions import ClientSessions
from .commands import Commands
from .creating import Creating
from .planning.limits import holders_of
from .registry import Registry, no_checkpoint

MAX_WAIT_S = 60.0


class Catalogue:
    def __init__(
        self,
        registry: Registry,
        commands: Commands,
        writer: Writer,
        reader: Reader,
        checkpoints: Path,
        now: Callable[[], float],
        drop: Callable[[str], Awaitable[None]],
        keyring: Keyring,
    ) -> None:
        self._registry, self._commands, self._keyring = registry, commands, keyring
        self._writer, self._reader, self._now, self._drop = writer, reader, now, drop
        self.sessions = ClientSessions()
        self.creating = Creating(registry, self.sessions, checkpoints, now)

    def load(self, store: Store) -> None:
        for row in store.client_sessions():
            self.sessions.add(row)

    async def answer(self, session: Session, request: CatalogueRequest) -> object:
        """The answer's payload; None where the answer is only that it is done. Raises LorryError."""
        tenant = session.tenant
        match request:
            case Query():
                return await self._look(session, request)
            case CreateClientSession():
                return await self._create_session(tenant, request)
            case TouchClientSession():
                return self.sessions.touch(tenant, request.session, self._now())
            case FinishClientSession():
                return await self._finish_session(tenant, request)
            case JoinSampler():
                return await self._join_sampler(tenant, request)
            case DeleteCheckpoint():
                checkpoint = self._registry.checkpoint(tenant, request.path)
                return await self._remove_checkpoint(checkpoint, self._did(session, "checkpoint_deleted", request.path))
            case PublishCheckpoint():
                did = self._did(session, f"checkpoint_{'' if request.public else 'un'}published", request.path)
                return await self._change(replace(self._own(tenant, request.path), public=request.public), did)
            case ExpireCheckpoint():
                return await self._expire(session, request)
            case CopyCheckpoint():
                return await self._copy(session, request)
            case MintToken():
                return self._keyring.token_for(session)
            case RevokeKey():
                return await self._keyring.revoke(tenant, request.api_key)
            case CountClientEvents():
                return self._writer.write(
                    lambda store: store.client_events_counted(tenant, request.events, request.failures)
                )
            case UsageBetween():
                start, end = request.start, request.end
                return await self._reader.read(lambda store: usage_between(store, tenant, start, end))
            case AuditBetween():
                whose = None if "admin" in session.key.scopes else tenant
                between = request.start, request.end
                return await self._reader.read(lambda store: store.audit(whose, *between))
            case LaneState():
                return await self._lane_state(tenant, request)
            case QueueState():
                self._registry.lane(tenant, LaneId(request.future.rpartition(":")[0]))
                return self._commands.queue_state(request.future)
            case Completions():
                return await self._completions(tenant, request)

    # Questions -------------------------------------------------------------------------------------------------------

    async def _look(self, session: Session, query: Query) -> object:
        tenant = session.tenant
        match query.what:
            case "capabilities":
                models = self._registry.models.all().items()
                return GetServerCapabilitiesResponse(
                    [SupportedModel(name, facts and facts.max_context) for name, facts in models]
                )
            case "run":
                run = self._registry.run(tenant, query.subject)
                known = await self._registry.models.ready(run.base_model)
                known.check(run.lora)
                return GetInfoResponse(run.id, run.base_model, run.lora.rank, known.facts.tokenizer_id)
            case "sampler":
                sampler = self._registry.sampler(tenant, query.subject)
                facts = (await self._registry.models.ready(sampler.base_model)).facts
                return SamplerInfo(sampler.id, sampler.base_model, facts.tokenizer_id, sampler.model_path)
            case "runs":
                return [_training_run(run) for run in self._registry.runs_of(tenant)]
            case "checkpoints":
                run = self._registry.run(tenant, query.subject).id if query.subject else None
                return [_checkpoint(row) for row in self._registry.checkpoints_of(tenant, run)]
            case "usage":
                return await self._reader.read(lambda store: usage(store, tenant))
            case "sessions":
                return [self._session(row) for row in self.sessions.of(tenant)]
            case "weights" | "files":
                checkpoint = self._registry.readable(tenant, query.subject)
                source = self._registry.run(checkpoint.tenant, checkpoint.run)
                folder = "/".join(Path(checkpoint.folder).parts[-3:])
                if query.what == "files":
                    did = self._did(session, "checkpoint_read", checkpoint.path, purpose="download")
                    await self._writer.write_and_wait(lambda store: store.audited(did))
                return WeightsInfo(checkpoint.path, source.base_model, source.lora, folder)
            case "tenant":
                return tenant
            case "key":
                return info_of(session.key)

    def _session(self, row: ClientSessionRow) -> ClientSession:
        return ClientSession(
            session_id=row.id,
            created_at=row.created_at,
            owner=row.tenant,
            tags=row.tags,
            user_metadata=row.user_metadata,
            display_name=row.display_name,
            status=self.sessions.status(row, self._now()),
            detail=row.detail,
            training_run_ids=[run.id for run in self._registry.runs_of(row.tenant) if run.session == row.id],
            sampler_ids=[s.id for s in self._registry.samplers_of(row.tenant) if s.session == row.id],
        )

    async def _lane_state(self, tenant: TenantId, request: LaneState) -> FutureState:
        """Raises what its model, or the run's shape, makes of it."""
        lane = self._registry.lane(tenant, request.lane)
        with anyio.move_on_after(min(request.timeout_s, MAX_WAIT_S)):
            known = await self._registry.models.ready(lane.base_model)
            if isinstance(lane, RunRow):
                known.check(lane.lora)
            return FutureState("active", f"{lane.base_model} has been loaded")
        return FutureState("paused_capacity", f"{lane.base_model} is being loaded")

    async def _completions(self, tenant: TenantId, request: Completions) -> CompletedSince:
        """The broker's clock runs out before the client's, so that an empty answer is an answer."""
        self._registry.lane(tenant, request.lane)
        lane, low, high, cursor = request.lane, request.low, request.high, request.cursor
        with anyio.move_on_after(min(request.timeout_s, MAX_WAIT_S)):
            while True:
                bell = self._commands.waiters.bell(lane)
                found, newest = await self._reader.read(lambda store: store.completed_since(lane, low, high, cursor))
                if found or request.timeout_s <= 0:
                    return CompletedSince(found, newest)
                await bell.wait()
        return CompletedSince([], cursor)

    # Client sessions and samplers ------------------------------------------------------------------------------------

    async def _create_session(self, tenant: TenantId, create: CreateClientSession) -> ClientSessionCreated:
        row = ClientSessionRow(
            id="session-" + secrets.token_hex(8),
            tenant=tenant,
            client=create.client[:200],
            tags=create.tags,
            user_metadata=create.user_metadata,
            display_name=create.display_name,
            created_at=self._now(),
        )
        self.sessions.add(row)
        await self._writer.write_and_wait(lambda store: store.client_session_created(row))
        return ClientSessionCreated(row.id)

    async def _finish_session(self, tenant: TenantId, finish: FinishClientSession) -> None:
        row = self.sessions.finish(tenant, finish.session, finish.reason, finish.detail)
        await self._writer.write_and_wait(
            lambda store: store.client_session_finished(row.id, finish.reason, row.detail)
        )

    async def _join_sampler(self, tenant: TenantId, join: JoinSampler) -> SamplerJoined:
        sampler = self._registry.sampler(tenant, join.sampler)
        sampler = replace(sampler, clients=sampler.clients + 1)
        self._registry.add_sampler(sampler)
        await self._writer.write_and_wait(lambda store: store.sampler_joined(sampler.id, sampler.clients))
        return SamplerJoined(sampler.clients)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _own(self, tenant: TenantId, path: str) -> CheckpointRow:
        return self._registry.checkpoint(tenant, path)

    async def _change(self, checkpoint: CheckpointRow, did: AuditEvent) -> None:
        """Raises NotFoundError where it went in this very moment."""
        self._registry.add_checkpoint(checkpoint)

        def record(store: Store) -> bool:
            if is_there := store.checkpoint_changed(checkpoint):
                store.audited(did)
            return is_there

        if not await self._writer.write_and_wait(record):
            raise no_checkpoint(checkpoint.path)

    async def _expire(self, session: Session, request: ExpireCheckpoint) -> None:
        checkpoint = self._own(session.tenant, request.path)
        changed = replace(checkpoint, expires_at=self._expiry(request.ttl_seconds), ephemeral=False)
        ttl = "never" if request.ttl_seconds is None else f"in {request.ttl_seconds} s"
        await self._change(changed, self._did(session, "checkpoint_expiry_set", request.path, expires=ttl))

    def _expiry(self, ttl_seconds: int | None) -> float | None:
        if ttl_seconds is not None and ttl_seconds < 1:
            raise InvalidRequestError.of("ttl_seconds", ttl_seconds, "a whole number from 1, or None for ever")
        return None if ttl_seconds is None else self._now() + ttl_seconds

    async def _remove_checkpoint(self, checkpoint: CheckpointRow, did: AuditEvent) -> None:
        """Its name is gone at once; its folder too, or when nothing needs it any more."""
        self._registry.remove_checkpoint(checkpoint)

        def record(store: Store) -> None:
            store.checkpoint_deleted(checkpoint)
            store.audited(did)

        await self._writer.write_and_wait(record)
        await self._drop(checkpoint.folder)

    def _did(self, session: Session, event: str, subject: str, **detail: str) -> AuditEvent:
        return AuditEvent(self._now(), session.tenant, session.key.id, event, subject, detail)

    async def _copy(self, session: Session, copy: CopyCheckpoint) -> CheckpointCopied:
        """Nothing is waited for between the look-up and the writing: the folder has another name before it can go."""
        run, mine, run_is_new = self.creating.copy(session.tenant, copy, self._expiry(copy.ttl_seconds))
        self._commands.meters.check_shape(holders_of(session.tenant, session.key.id), run.lora.rank, run.base_model)
        run = replace(run, key=session.key.id) if run_is_new else run
        did = self._did(session, "checkpoint_copied", mine.path, source=copy.path)
        copy_is_new = not self._registry.is_taken(mine.path)
        if run_is_new:
            self._commands.accepting.add_run(run)
        if copy_is_new:
            self._registry.add_checkpoint(mine)

        def record(store: Store) -> None:
            if run_is_new:
                store.run_created(run)
            if copy_is_new:
                store.checkpoint_saved(mine)
                store.audited(did)

        await self._writer.write_and_wait(record)
        return CheckpointCopied(mine.path)

    async def import_adapter(self, told: ImportAdapter) -> AdapterImported:
        """Its folder is there. Raises NotFoundError where it is not, or where there is no such tenant, and what
        `Creating.imported` does."""
        if not await self._reader.read(lambda store: store.has_tenant(told.tenant)):
            raise no_tenant(told.tenant)
        run, checkpoints, is_new = self.creating.imported(told)
        folder = Path(checkpoints[0].folder)
        if not await to_thread.run_sync(folder.is_dir):
            raise NotFoundError(f"there is no {folder} to be imported", field="run")
        if is_new and self._registry.run_of(LaneId(run.id)) is None:
            self._commands.accepting.add_run(run)
            for checkpoint in checkpoints:
                self._registry.add_checkpoint(checkpoint)

            def record(store: Store) -> None:
                store.run_created(run)
                for checkpoint in checkpoints:
                    store.checkpoint_saved(checkpoint)
                names = {"path": checkpoints[0].path, "sampler_path": checkpoints[1].path}
                did = AuditEvent(run.created_at, run.tenant, OPERATOR, "adapter_imported", run.id, names)
                store.audited(did)

            await self._writer.write_and_wait(record)
        else:
            await self._writer.write_and_wait(lambda _: None)
        training, sampler = checkpoints
        return AdapterImported(training.path, sampler.path)


def _training_run(run: RunRow) -> TrainingRun:
    return TrainingRun(
        training_run_id=run.id,
        base_model=run.base_model,
        model_owner=run.tenant,
        lora_rank=run.lora.rank,
        last_request_time=run.last_request_at,
        user_metadata=run.user_metadata or None,
        session_id=run.session,
    )


def _checkpoint(row: CheckpointRow) -> Checkpoint:
    segment = row.path.removeprefix(f"tinker://{row.run}/")
    return Checkpoint(
        checkpoint_id=segment,
        checkpoint_type=row.kind,
        time=row.created_at,
        tinker_path=row.path,
        size_bytes=row.size_bytes,
        expires_at=row.expires_at,
        public=row.public,
        user_metadata=row.user_metadata or None,
    )
