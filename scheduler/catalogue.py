"""What clients ask about and change beside commands: client sessions, samplers' clients, checkpoints, usage.

It decides who may see and do what; what it changes is durable before it answers.
"""

import secrets
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import anyio

from ..storage.lineage import lineage
from ..storage.reader import Reader
from ..storage.reports import usage, usage_between
from ..storage.rows import ClientSessionRow, RunRow, SamplerRow
from ..storage.store import Store
from ..storage.timelines import failures, timeline
from ..storage.writer import Writer
from ..wire.catalogue_messages import (
    AssignProject,
    AuditBetween,
    CatalogueRequest,
    ClientSessionCreated,
    CompletedSince,
    Completions,
    CopyCheckpoint,
    CountClientEvents,
    CreateClientSession,
    DeleteCheckpoint,
    DeleteCheckpoints,
    ExpireCheckpoint,
    FindRuns,
    FinishClientSession,
    FutureState,
    GetMetrics,
    JoinSampler,
    LaneState,
    LendCheckpoint,
    MintToken,
    OwnJobs,
    PublishCheckpoint,
    Query,
    QueueState,
    RevokeKey,
    SamplerInfo,
    SamplerJoined,
    SessionTimeline,
    SetPriority,
    TouchClientSession,
    UsageBetween,
)
from ..wire.errors import InvalidRequestError
from ..wire.ids import LaneId, TenantId
from ..wire.metrics import LatestMetrics, LogMetrics, ReadMetrics
from ..wire.timelines import Timeline
from ..wire.types import (
    ClientSession,
    GetInfoResponse,
    GetServerCapabilitiesResponse,
    Project,
    SupportedModel,
    TrainingRun,
    WeightsInfo,
)
from .access import permissions
from .access.administration import info_of
from .access.keyring import Keyring
from .access.sessions import Session
from .client_sessions import ClientSessions
from .commands import Commands
from .creating import Creating, checked_priority
from .planning.limits import project_holder
from .projects import Projects
from .registry import Registry
from .shelf import Shelf, did_by

MAX_WAIT_S = 60.0
_LONGEST_S = 31 * 86_400.0
"""Of what was used by the hour."""


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
        self._writer, self._reader, self._now = writer, reader, now
        self.overview = commands.overview
        self.sessions = ClientSessions()
        self.projects = Projects(writer, now)
        self.creating = Creating(registry, self.sessions, self.projects, checkpoints, now)
        self.shelf = Shelf(registry, commands, self.creating, self.projects, writer, reader, now, drop)

    def load(self, store: Store) -> None:
        self.projects.load(store)
        for row in store.client_sessions():
            self.sessions.add(row)

    async def answer(self, session: Session, request: CatalogueRequest, payload: bytes) -> object:
        """The answer's payload; None where the answer is only that it is done. Raises LorryError."""
        tenant = session.tenant
        match request:
            case Query():
                return await self._look(session, request)
            case CreateClientSession():
                return await self._create_session(session, request)
            case AssignProject():
                return await self._assign(session, request)
            case FindRuns():
                return [_training_run(run) for run in self._registry.runs_of(tenant) if _is_sought(run, request)]
            case TouchClientSession():
                return self.sessions.touch(tenant, request.session, self._now())
            case FinishClientSession():
                return await self._finish_session(tenant, request)
            case JoinSampler():
                return await self._join_sampler(tenant, request)
            case DeleteCheckpoint() | DeleteCheckpoints() | PublishCheckpoint() | ExpireCheckpoint() | CopyCheckpoint():
                return await self.shelf.answer(session, request)
            case LendCheckpoint():
                return await self.shelf.answer(session, request)
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
                if not 0 <= end - start <= _LONGEST_S:
                    raise InvalidRequestError.of("end", end, f"up to {_LONGEST_S / 86_400:.0f} days after start")
                now = self._now()
                return await self._reader.read_at_leisure(lambda s: usage_between(s, tenant, start, end, now))
            case AuditBetween():
                whose = None if "admin" in session.key.scopes else tenant
                between = request.start, request.end
                return await self._reader.read_at_leisure(lambda store: store.audit(whose, *between))
            case LaneState():
                return await self._lane_state(tenant, request)
            case QueueState():
                self._registry.lane(tenant, LaneId(request.future.rpartition(":")[0]))
                return self._commands.queueing.state(request.future)
            case SetPriority():
                return await self._prioritise(session, request)
            case OwnJobs():
                return await self.overview.own_jobs(tenant, request)
            case SessionTimeline():
                return await self._timeline(tenant, request)
            case GetMetrics():
                return self._commands.exposition.text()
            case LogMetrics():
                return await self._commands.metrics.log(tenant, request, payload)
            case LatestMetrics():
                return await self._commands.metrics.latest(tenant, request, self._reader)
            case ReadMetrics():
                return await self._commands.metrics.read(tenant, request, self._reader)
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
                return SamplerInfo(
                    sampler.id, sampler.base_model, facts.tokenizer_id, sampler.model_path, facts.end_tokens
                )
            case "checkpoints":
                run = self._registry.run(tenant, query.subject).id if query.subject else None
                return [self.shelf.shown(row) for row in self._registry.checkpoints_of(tenant, run)]
            case "usage":
                return await self._reader.read_at_leisure(lambda store: usage(store, tenant))
            case "sessions":
                return [self._session(row) for row in self.sessions.of(tenant)]
            case "weights" | "files":
                checkpoint = self._registry.readable(tenant, query.subject)
                source = self._registry.run(checkpoint.tenant, checkpoint.run)
                folder = "/".join(Path(checkpoint.folder).parts[-3:])
                if query.what == "files":
                    did = did_by(session, self._now(), "checkpoint_read", checkpoint.path, purpose="download")
                    await self._writer.write_and_wait(lambda store: store.audited(did))
                return WeightsInfo(checkpoint.path, source.base_model, source.lora, folder)
            case "tenant":
                return tenant
            case "key":
                return info_of(session.key)
            case "storage_price":
                return await self._reader.read(lambda store: store.storage_price() / 1e6)
            case "failures":
                failed_in = self._registry.run(tenant, query.subject or "").id
                return await self._reader.read_at_leisure(lambda store: failures(store, failed_in))
            case "lineage":
                run = self._registry.run(tenant, query.subject).id if query.subject else None
                return await self._reader.read_at_leisure(lambda store: lineage(store, tenant, run))
            case "metric_names":
                return self._commands.metrics.names(self._registry.run(tenant, query.subject).id)
            case "projects":
                runs = Counter(run.project for run in self._registry.runs_of(tenant))
                return [Project(name, at, runs[name]) for name, at in self.projects.of(tenant).items()]

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
            project=row.project,
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

    async def _timeline(self, tenant: TenantId, request: SessionTimeline) -> Timeline:
        subject, after = request.subject, request.after
        run = self._registry.run_of(LaneId(subject))
        if run is None or run.tenant != tenant:
            self.sessions.get(tenant, subject)
        return await self._reader.read_at_leisure(lambda store: timeline(store, tenant, subject, after))

    # Client sessions and samplers ------------------------------------------------------------------------------------

    async def _create_session(self, session: Session, create: CreateClientSession) -> ClientSessionCreated:
        row = ClientSessionRow(
            id="session-" + secrets.token_hex(8),
            tenant=session.tenant,
            project=self.projects.checked(session.tenant, create.project),
            client=create.client[:200],
            tags=create.tags,
            user_metadata=create.user_metadata,
            display_name=create.display_name,
            created_at=self._now(),
        )
        self.projects.made(row.tenant, row.project, session.key.id)
        self.sessions.add(row)
        await self._writer.write_and_wait(lambda store: store.client_session_created(row))
        return ClientSessionCreated(row.id)

    async def _finish_session(self, tenant: TenantId, finish: FinishClientSession) -> None:
        row = self.sessions.finish(tenant, finish.session, finish.reason, finish.detail)
        await self._writer.write_and_wait(
            lambda store: store.client_session_finished(row.id, finish.reason, row.detail)
        )

    async def _assign(self, session: Session, request: AssignProject) -> None:
        self.sessions.get(session.tenant, request.session)
        project = self.projects.checked(session.tenant, request.project)
        self.projects.made(session.tenant, project, session.key.id)
        before = self.sessions.assign(session.tenant, request.session, project).project
        for run in self._registry.assign(session.tenant, request.session, project):
            holders = (project_holder(session.tenant, each) for each in (run.project, project))
            self._commands.meters.moved(LaneId(run.id), *holders)
        did = did_by(session, self._now(), "session_project_set", request.session, project=project, before=before)

        def record(store: Store) -> None:
            store.session_assigned(request.session, project, did.at)
            store.audited(did)

        await self._writer.write_and_wait(record)

    async def _prioritise(self, session: Session, request: SetPriority) -> None:
        lane, priority = self._registry.lane(session.tenant, request.lane), checked_priority(request.priority)
        permissions.check_lane(session.key.scopes, "prioritise", of_sampler=isinstance(lane, SamplerRow))
        self._registry.prioritise(request.lane, priority)
        self._commands.set_priority(lane.tenant, lane.base_model, request.lane, priority)
        await self._writer.write_and_wait(lambda store: store.lane_prioritised(request.lane, priority))

    async def _join_sampler(self, tenant: TenantId, join: JoinSampler) -> SamplerJoined:
        sampler = self._registry.sampler(tenant, join.sampler)
        sampler = replace(sampler, clients=sampler.clients + 1)
        self._registry.add_sampler(sampler)
        await self._writer.write_and_wait(lambda store: store.sampler_joined(sampler.id, sampler.clients))
        return SamplerJoined(sampler.clients)


def _training_run(run: RunRow) -> TrainingRun:
    return TrainingRun(
        training_run_id=run.id,
        base_model=run.base_model,
        model_owner=run.tenant,
        lora_rank=run.lora.rank,
        last_request_time=run.last_request_at,
        user_metadata=run.user_metadata or None,
        session_id=run.session,
        project=run.project,
    )


def _is_sought(run: RunRow, request: FindRuns) -> bool:
    return (
        request.project in (None, run.project)
        and request.base_model in (None, run.base_model)
        and request.user_metadata.items() <= run.user_metadata.items()
    )
