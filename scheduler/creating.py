"""New runs, samplers and copies, as rows. What was made under a nonce before is that again."""

import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from ..storage.checkpoints import imported_folder
from ..storage.rows import CheckpointKind, CheckpointRow, RunRow, SamplerRow
from ..wire.catalogue_messages import CopyCheckpoint, Slot
from ..wire.client_messages import CreateRun, CreateSampler, ImportAdapter
from ..wire.commands import check_lora_config
from ..wire.errors import InvalidRequestError
from ..wire.ids import KeyId, LaneId, ProjectId, RunId, SamplerId, TenantId
from ..wire.types import LoraConfig
from .client_sessions import ClientSessions
from .projects import Projects
from .registry import Registry, checkpoint_path, run_in_slot, sampler_in_slot
from .restore_points import snapshot_folder

_NO_SEQ = -1
"""Of a checkpoint that no command saved: a copy, or one from elsewhere."""
_IMPORTED: tuple[CheckpointKind, CheckpointKind] = ("training", "sampler")
MAX_PRIORITY = 100
_RUN = re.compile(r"run-[0-9a-f]{16}")


class Creating:
    def __init__(
        self,
        registry: Registry,
        sessions: ClientSessions,
        projects: Projects,
        checkpoints: Path,
        now: Callable[[], float],
    ) -> None:
        self._registry, self._sessions, self._checkpoints, self._now = registry, sessions, checkpoints, now
        self._projects = projects

    def run(self, tenant: TenantId, key: KeyId, create: CreateRun) -> tuple[RunRow, bool]:
        """The run, and whether it is new. While its model is being loaded, only what needs no model is checked.

        Raises InvalidRequestError, UnknownModelError, NotFoundError.
        """
        nonce = self._nonce(tenant, create.nonce, create.slot)
        if isinstance(made := self._registry.made_before(tenant, nonce), RunRow):
            return made, False
        self._check(create.base_model, lora := create.lora)
        if lora.seed is None:
            lora = msgspec.structs.replace(lora, seed=secrets.randbits(63))
        run = self._new_run(tenant, nonce, create.slot, create.base_model, lora)
        project = self._project(tenant, create.slot, create.project)
        told = create.user_metadata
        priority = checked_priority(create.priority)
        run = replace(run, key=key, project=project, priority=priority)
        return replace(run, user_metadata=told, first_seq=create.first_seq), True

    def sampler(self, tenant: TenantId, create: CreateSampler) -> tuple[SamplerRow, bool]:
        """The sampler, and whether it is new. It keeps the folder that its path leads to now."""
        slot = create.slot
        if slot is not None:
            self._sessions.get(tenant, slot.session)
        nonce = sampler_in_slot(slot.session, slot.number) if slot else create.nonce
        if isinstance(made := self._registry.made_before(tenant, nonce), SamplerRow):
            return made, False
        if (create.base_model is None) == (create.model_path is None):
            raise InvalidRequestError("give exactly one of base_model and model_path", field="model_path")
        base_model, folder, project = create.base_model or "", None, create.project
        if create.model_path is not None:
            checkpoint = self._registry.readable(tenant, create.model_path, "sampler")
            source, folder = self._registry.run(checkpoint.tenant, checkpoint.run), checkpoint.folder
            base_model = source.base_model
            if slot is None and project is None and source.tenant == tenant:
                project = source.project
        self._registry.models.known(base_model)
        sampler = SamplerRow(
            id=SamplerId(nonce if slot else "sampler-" + secrets.token_hex(8)),
            tenant=tenant,
            nonce=nonce,
            base_model=base_model,
            model_path=create.model_path,
            created_at=self._now(),
            session=slot.session if slot else None,
            folder=folder,
            project=self._project(tenant, slot, project),
            priority=checked_priority(create.priority),
        )
        return sampler, True

    def copy(
        self, tenant: TenantId, key: KeyId, copy: CopyCheckpoint, expires_at: float | None
    ) -> tuple[RunRow, CheckpointRow, bool]:
        """A run that never trained, its one checkpoint, and whether these are new. Both checkpoints' names lead to one
        folder, which never changes, and stays as long as one of them does."""
        source = self._registry.readable(tenant, copy.path)
        origin = self._registry.run(source.tenant, source.run)
        nonce = self._nonce(tenant, copy.nonce, copy.slot)
        made = self._registry.made_before(tenant, nonce)
        is_new = not isinstance(made, RunRow)
        if isinstance(made, RunRow):
            run = made
        else:
            project = self._project(tenant, copy.slot, copy.project)
            run = self._new_run(tenant, nonce, copy.slot, origin.base_model, origin.lora)
            run = replace(run, key=key, project=project, first_seq=1)
        path = checkpoint_path(run.id, source.kind, source.name or f"copy-{source.seq}")
        mine = replace(source, path=path, run=run.id, tenant=tenant, name=path.rpartition("/")[2], seq=_NO_SEQ)
        mine = replace(mine, created_at=self._now(), expires_at=expires_at, public=False, ephemeral=False)
        return run, mine, is_new

    def imported(self, told: ImportAdapter) -> tuple[RunRow, list[CheckpointRow], bool]:
        """A run that never trained, its checkpoints to load and to sample from, and whether these are new. What an
        operator put into their folder is of no other run.

        Raises InvalidRequestError for what cannot be, UnknownModelError.
        """
        if not _RUN.fullmatch(told.run):
            raise InvalidRequestError.of("run", told.run, "run-, and 16 hexadecimal digits")
        self._check(told.base_model, told.lora)
        made = self._registry.run_of(LaneId(told.run))
        if made is not None and (made.tenant, made.nonce) != (told.tenant, told.run):
            raise InvalidRequestError.of("run", told.run, "a new run")
        run = made or RunRow(
            id=told.run,
            tenant=told.tenant,
            nonce=told.run,
            base_model=told.base_model,
            lora=told.lora,
            user_metadata={},
            created_at=self._now(),
            last_request_at=self._now(),
            first_seq=1,
            snapshot_folder=snapshot_folder(self._checkpoints, told.run),
        )
        rows = [
            CheckpointRow(
                path=checkpoint_path(run.id, kind, told.name),
                run=run.id,
                tenant=run.tenant,
                kind=kind,
                name=told.name,
                folder=str(imported_folder(self._checkpoints, run.id)),
                seq=_NO_SEQ,
                size_bytes=told.size_bytes,
                checksum=told.checksum,
                created_at=self._now(),
                expires_at=None,
            )
            for kind in _IMPORTED
        ]
        return run, rows, made is None

    def _check(self, base_model: str, lora: LoraConfig) -> None:
        """Against what is known of the model, whose limits are the ones to tell."""
        if known := self._registry.models.known(base_model):
            known.check(lora)
        else:
            check_lora_config(lora)

    def _nonce(self, tenant: TenantId, nonce: str, slot: Slot | None) -> str:
        """What a run is made under. Raises NotFoundError for a place in a client session that is not the tenant's."""
        if slot is None:
            return nonce
        self._sessions.get(tenant, slot.session)
        return run_in_slot(slot.session, slot.number)

    def _project(self, tenant: TenantId, slot: Slot | None, said: ProjectId | None) -> ProjectId:
        """What is made in a client session is in that one's. Raises InvalidRequestError, LimitReachedError."""
        if slot is None:
            return self._projects.checked(tenant, said)
        project = self._sessions.get(tenant, slot.session).project
        if said not in (None, project):
            raise InvalidRequestError.of("project", said, f"{project!r}, which its client session is in, or none")
        return project

    def _new_run(self, tenant: TenantId, nonce: str, slot: Slot | None, base_model: str, lora: LoraConfig) -> RunRow:
        run = RunId(nonce if slot else "run-" + secrets.token_hex(8))
        return RunRow(
            id=run,
            tenant=tenant,
            nonce=nonce,
            base_model=base_model,
            lora=lora,
            user_metadata={},
            created_at=self._now(),
            last_request_at=self._now(),
            session=slot.session if slot else None,
            snapshot_folder=snapshot_folder(self._checkpoints, run),
        )


def checked_priority(priority: int) -> int:
    """Raises InvalidRequestError."""
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequestError.of("priority", priority, f"a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    return priority
