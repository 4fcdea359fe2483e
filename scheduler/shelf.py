"""Checkpoints: deleted, published, given a time to live, copied, brought in. What it changes is durable first."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from anyio import to_thread

from ..storage.audit import OPERATOR
from ..storage.reader import Reader
from ..storage.rows import CheckpointRow
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.catalogue_messages import (
    CheckpointCopied,
    CopyCheckpoint,
    DeleteCheckpoint,
    DeleteCheckpoints,
    ExpireCheckpoint,
    LendCheckpoint,
    PublishCheckpoint,
)
from ..wire.client_messages import AdapterImported, ImportAdapter
from ..wire.errors import NotFoundError
from ..wire.ids import LaneId, TenantId
from ..wire.types import AuditEvent, Checkpoint
from .access.administration import no_tenant
from .access.sessions import Session
from .admission import check_ttl
from .checkpoints import Checkpoints
from .choosing import checked, chosen
from .commands import Commands
from .creating import Creating
from .planning.limits import holders_of
from .projects import Projects
from .registry import Registry

ShelfRequest: TypeAlias = (
    DeleteCheckpoint | DeleteCheckpoints | PublishCheckpoint | LendCheckpoint | ExpireCheckpoint | CopyCheckpoint
)


class Shelf:
    def __init__(
        self,
        registry: Registry,
        commands: Commands,
        creating: Creating,
        projects: Projects,
        writer: Writer,
        reader: Reader,
        now: Callable[[], float],
        drop: Callable[[str], Awaitable[None]],
    ) -> None:
        self._registry, self._commands, self._creating, self._projects = registry, commands, creating, projects
        self._writer, self._reader, self._now = writer, reader, now
        self.checkpoints = Checkpoints(registry, writer, now, drop)

    async def answer(self, session: Session, request: ShelfRequest) -> CheckpointCopied | list[Checkpoint] | None:
        """Raises NotFoundError, InvalidRequestError, LimitReachedError."""
        match request:
            case DeleteCheckpoint():
                checkpoint = self._own(session.tenant, request.path)
                did = did_by(session, self._now(), "checkpoint_deleted", request.path)
                return await self.checkpoints.remove((checkpoint, did))
            case DeleteCheckpoints():
                return await self._remove_all(session, request)
            case PublishCheckpoint():
                event = f"checkpoint_{'' if request.public else 'un'}published"
                did = did_by(session, self._now(), event, request.path)
                shared = replace(self._own(session.tenant, request.path), public=request.public)
                return await self.checkpoints.change(shared, did)
            case LendCheckpoint():
                return await self._lend(session, request)
            case ExpireCheckpoint():
                return await self._expire(session, request)
            case CopyCheckpoint():
                return await self._copy(session, request)

    def _own(self, tenant: TenantId, path: str) -> CheckpointRow:
        return self._registry.checkpoint(tenant, path)

    async def _lend(self, session: Session, request: LendCheckpoint) -> None:
        """Told of once, while it is lent."""
        path = self._own(session.tenant, request.path).path
        if self._registry.lend(path, request.tenant):
            did = did_by(session, self._now(), "checkpoint_lent", path, to=request.tenant)
            await self._writer.write_and_wait(lambda store: store.audited(did))

    async def _expire(self, session: Session, request: ExpireCheckpoint) -> None:
        checkpoint = self._own(session.tenant, request.path)
        changed = replace(checkpoint, expires_at=self._expiry(request.ttl_seconds), ephemeral=False)
        ttl = "never" if request.ttl_seconds is None else f"in {request.ttl_seconds} s"
        did = did_by(session, self._now(), "checkpoint_expiry_set", request.path, expires=ttl)
        await self.checkpoints.change(changed, did)

    def _expiry(self, ttl_seconds: int | None) -> float | None:
        if ttl_seconds is not None:
            check_ttl(ttl_seconds)
        return None if ttl_seconds is None else self._now() + ttl_seconds

    async def _remove_all(self, session: Session, request: DeleteCheckpoints) -> list[Checkpoint]:
        wanted = checked(request.chosen)
        there = self._registry.checkpoints_of(session.tenant)
        found = chosen(there, wanted, lambda run: self._registry.run(session.tenant, run).project, self._now())
        told = [self.shown(each) for each in found]
        if not request.only_tell:
            now = self._now()
            await self.checkpoints.remove(*((c, did_by(session, now, "checkpoint_deleted", c.path)) for c in found))
        return told

    def shown(self, row: CheckpointRow) -> Checkpoint:
        return Checkpoint(
            checkpoint_id=row.path.removeprefix(f"tinker://{row.run}/"),
            checkpoint_type=row.kind,
            time=row.created_at,
            tinker_path=row.path,
            size_bytes=row.size_bytes,
            expires_at=row.expires_at,
            public=row.public,
            user_metadata=row.user_metadata or None,
            project=self._registry.run(row.tenant, row.run).project,
        )

    async def _copy(self, session: Session, copy: CopyCheckpoint) -> CheckpointCopied:
        """Nothing is waited for between the look-up and the writing: the folder has another name before it can go."""
        expires_at = self._expiry(copy.ttl_seconds)
        run, mine, run_is_new = self._creating.copy(session.tenant, session.key.id, copy, expires_at)
        holders = holders_of(session.tenant, session.key.id, run.project)
        self._commands.meters.check_shape(holders, run.lora.rank, run.base_model)
        kept_for_s = self._commands.meters.kept_for_s(holders, mine.kind)
        if expires_at is None and kept_for_s is not None:
            mine = replace(mine, expires_at=self._now() + kept_for_s)
        did = did_by(session, self._now(), "checkpoint_copied", mine.path, source=copy.path)
        copy_is_new = not self._registry.is_taken(mine.path)
        if run_is_new:
            self._projects.made(run.tenant, run.project, session.key.id)
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
        run, checkpoints, is_new = self._creating.imported(told)
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


def did_by(session: Session, now: float, event: str, subject: str, **detail: str) -> AuditEvent:
    return AuditEvent(now, session.tenant, session.key.id, event, subject, detail)
