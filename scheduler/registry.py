"""What exists: runs, samplers, checkpoints and models, and who may see them. Pure look-ups over rows; no I/O.

Anything that is not the asking tenant's does not exist for it: the answer is the same, so nothing can be guessed.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import msgspec

from ..storage.rows import CheckpointKind, CheckpointRow, CommandRow, RunRow, SamplerRow
from ..wire.errors import InvalidRequestError, NotFoundError
from ..wire.ids import LaneId, ProjectId, RunId, SamplerId, TenantId
from ..wire.news import Change
from ..wire.types import LoraConfig
from .models import Models

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SEGMENTS: dict[CheckpointKind, str] = {
    "training": "weights",
    "sampler": "sampler_weights",
    "external": "external_weights",
}

_OF_A_RUN = ("rank", "train_attn", "train_mlp", "train_unembed")
"""What a run's owner says of its adapter, and what is loaded into it has to have."""
_COMES_WITH_WEIGHTS = ("alpha", "target_modules", "expert_lora")
"""What the Tinker SDK cannot say: a run that begins with a load has it from there, unless its owner said otherwise."""
_DEFAULT = LoraConfig()
_LISTED_OF_RUNS = ("lora", "user_metadata", "project", "priority", "session")
"""What a list of runs shows of one, but for when it was used; the rest is the broker's own."""


LENT_FOR_S = 60.0


def ephemeral_path(run: RunId, seq: int) -> str:
    """Where weights without a name go: a user's name cannot start so."""
    return f"tinker://{run}/{_SEGMENTS['sampler']}/_{seq}"


def checkpoint_path(run: RunId, kind: CheckpointKind, name: str | None) -> str:
    """`tinker://RUN/weights/NAME`. Raises InvalidRequestError for a name that could be more than a folder's."""
    if name is None or not _NAME.fullmatch(name):
        raise InvalidRequestError.of("name", name, "1 to 128 letters, digits, '.', '_' or '-', not starting with '.'")
    return f"tinker://{run}/{_SEGMENTS[kind]}/{name}"


def run_in_slot(session: str, number: int) -> str:
    """The id of a run that is made in a numbered place of a client session, so that making it twice makes it once."""
    return f"{session}:train:{number}"


def sampler_in_slot(session: str, number: int) -> str:
    return f"{session}:sample:{number}"


def run_of_path(path: str | None) -> str:
    """The run whose weights a path names; empty for none."""
    return "" if path is None else path.removeprefix("tinker://").partition("/")[0]


def no_checkpoint(path: str | None) -> NotFoundError:
    return NotFoundError(f"there is no checkpoint {path!r}", field="path")


class Registry:
    """`now` is Unix seconds: what has expired is gone at that second, whenever its folder goes. `on_change` is told
    whose what has changed, of what is listed."""

    def __init__(self, models: Iterable[str], now: Callable[[], float]) -> None:
        self.models = Models(models)
        self._now = now
        self.on_change: Callable[[TenantId, Change], None] = _nobody
        self._runs: dict[RunId, RunRow] = {}
        self._samplers: dict[SamplerId, SamplerRow] = {}
        self._nonces: dict[tuple[TenantId, str], RunRow | SamplerRow] = {}
        self._checkpoints: dict[str, CheckpointRow] = {}
        self._saving: dict[str, dict[int, str]] = {}
        self._begun: set[LaneId] = set()
        self._lent: dict[tuple[TenantId, str], float] = {}

    # Runs and samplers -----------------------------------------------------------------------------------------------

    def add_run(self, run: RunRow) -> None:
        before = self._runs.get(run.id)
        self._runs[run.id] = self._nonces[run.tenant, run.nonce] = run
        if before is None or any(getattr(before, name) != getattr(run, name) for name in _LISTED_OF_RUNS):
            self.on_change(run.tenant, "runs")

    def add_sampler(self, sampler: SamplerRow) -> None:
        before = self._samplers.get(sampler.id)
        self._samplers[sampler.id] = self._nonces[sampler.tenant, sampler.nonce] = sampler
        if before is None or replace(before, clients=sampler.clients) != sampler:
            self.on_change(sampler.tenant, "samplers")

    def outlive_sampler(self, sampler: str) -> None:
        """Its weights are gone; that it was there is remembered for a while, to say so."""
        if row := self._samplers.get(SamplerId(sampler)):
            self.add_sampler(replace(row, folder=None, outlived=True))

    def remove_sampler(self, sampler: str) -> None:
        if row := self._samplers.pop(SamplerId(sampler), None):
            self._nonces.pop((row.tenant, row.nonce), None)
            self.on_change(row.tenant, "samplers")

    def made_before(self, tenant: TenantId, nonce: str) -> RunRow | SamplerRow | None:
        return self._nonces.get((tenant, nonce))

    def prioritise(self, lane: LaneId, priority: int) -> None:
        if run := self.run_of(lane):
            self.add_run(replace(run, priority=priority))
        elif sampler := self.sampler_of(lane):
            self.add_sampler(replace(sampler, priority=priority))

    def assign(self, tenant: TenantId, session: str, project: ProjectId) -> list[RunRow]:
        """What was made in a client session is in this project now; the runs as they were before."""
        runs = [run for run in self.runs_of(tenant) if run.session == session]
        for run in runs:
            self.add_run(replace(run, project=project))
        for sampler in self.samplers_of(tenant):
            if sampler.session == session:
                self.add_sampler(replace(sampler, project=project))
        return runs

    def run(self, tenant: TenantId, run: str | None) -> RunRow:
        row = self._runs.get(RunId(run or ""))
        if row is None or row.tenant != tenant:
            raise NotFoundError(f"there is no run {run!r}", field="run")
        return row

    def owned(self, tenant: TenantId, runs: Iterable[RunId]) -> list[RunId]:
        """Those of these that are the tenant's."""
        return [run for run in runs if (row := self._runs.get(run)) is not None and row.tenant == tenant]

    def sampler(self, tenant: TenantId, sampler: str | None) -> SamplerRow:
        row = self._samplers.get(SamplerId(sampler or ""))
        if row is None or row.tenant != tenant:
            raise NotFoundError(f"there is no sampler {sampler!r}", field="sampler")
        return row

    def lane(self, tenant: TenantId, lane: LaneId) -> RunRow | SamplerRow:
        row = self._runs.get(RunId(lane)) or self._samplers.get(SamplerId(lane))
        if row is None or row.tenant != tenant:
            raise NotFoundError(f"there is no run or sampler {lane!r}", field="run")
        return row

    def run_of(self, lane: LaneId) -> RunRow | None:
        return self._runs.get(RunId(lane))

    def sampler_of(self, lane: LaneId) -> SamplerRow | None:
        return self._samplers.get(SamplerId(lane))

    def runs_of(self, tenant: TenantId) -> list[RunRow]:
        return [run for run in self._runs.values() if run.tenant == tenant]

    def samplers_of(self, tenant: TenantId) -> list[SamplerRow]:
        return [sampler for sampler in self._samplers.values() if sampler.tenant == tenant]

    def samplers_in_flight(self, run: RunId) -> list[SamplerRow]:
        """Those that get its newest weights."""
        return [row for row in self._samplers.values() if row.in_flight and run_of_path(row.model_path) == run]

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def add_checkpoint(self, checkpoint: CheckpointRow) -> None:
        self._checkpoints[checkpoint.path] = checkpoint
        if not checkpoint.ephemeral:
            self.on_change(checkpoint.tenant, "checkpoints")

    def remove_checkpoint(self, checkpoint: CheckpointRow) -> None:
        """Unless another has taken its name since."""
        if self._checkpoints.get(checkpoint.path) is checkpoint:
            del self._checkpoints[checkpoint.path]
            if not checkpoint.ephemeral:
                self.on_change(checkpoint.tenant, "checkpoints")

    def checkpoint(self, tenant: TenantId, path: str | None) -> CheckpointRow:
        """One of the tenant's own."""
        row = self._unexpired(path or "")
        if row is None or row.tenant != tenant:
            raise no_checkpoint(path)
        return row

    def existing(self, path: str) -> CheckpointRow | None:
        """Whoever's it is, and also one that has expired and is not forgotten yet."""
        return self._checkpoints.get(path)

    def readable(self, tenant: TenantId, path: str | None, kind: CheckpointKind | None = None) -> CheckpointRow:
        """One of the tenant's own, or a public one, or one that is lent to it."""
        row = self._unexpired(path or "")
        if row is None or not (row.public or row.tenant == tenant or self._is_lent(tenant, row.path)):
            raise no_checkpoint(path)
        if kind is not None and row.kind != kind:
            verb = "save_state" if kind == "training" else "save_weights_for_sampler"
            raise InvalidRequestError.of("path", path, f"a checkpoint made by {verb}")
        return row

    def lend(self, path: str, tenant: TenantId) -> bool:
        """To another tenant; whether that is news."""
        now = self._now()
        self._lent = {lent: until for lent, until in self._lent.items() if until > now}
        is_new = (tenant, path) not in self._lent
        self._lent[tenant, path] = now + LENT_FOR_S
        return is_new

    def _is_lent(self, tenant: TenantId, path: str) -> bool:
        return self._lent.get((tenant, path), 0.0) > self._now()

    def is_taken(self, path: str, seq: int | None = None) -> bool:
        """Whether another save than the one of this `seq` has the name, or, for training states, will have it."""
        existing = self._unexpired(path)
        return (existing is not None and existing.seq != seq) or bool(self._saving.get(path, {}).keys() - {seq})

    def begins_with(self, row: CommandRow, next_seq: int | None) -> bool:
        """Whether a load is the first of its run that is executed, so that no adapter of it was ever made."""
        return row.kind == "load_state" and row.seq == next_seq and row.lane not in self._begun

    def begun(self, lane: LaneId) -> None:
        if RunId(lane) in self._runs:
            self._begun.add(lane)

    def loadable(self, run: RunRow, path: str | None, seq: int, *, begins: bool = False) -> str:
        """The folder of the training state that a load_state with this `seq` finds at `path`, if it fits `run`'s
        adapter. A save of the run itself that is on its way before it counts as made. What a run `begins` with may say
        what the adapter is, where its owner did not."""
        own = [at for at in self._saving.get(path or "", {}) if at < seq]
        if own and run_of_path(path) == run.id:
            return self._saving[path or ""][max(own)]
        checkpoint = self.readable(run.tenant, path, "training")
        source = self._runs[checkpoint.run]
        if source.base_model != run.base_model:
            raise InvalidRequestError.of("path", path, f"a checkpoint of {run.base_model}, not {source.base_model}")
        comes = _COMES_WITH_WEIGHTS if begins else ()
        for name in (*_OF_A_RUN, *_COMES_WITH_WEIGHTS):
            theirs, ours = getattr(source.lora, name), getattr(run.lora, name)
            if theirs != ours and not (name in comes and ours == getattr(_DEFAULT, name)):
                raise InvalidRequestError.of("path", path, f"a checkpoint with {name} {ours}, its own is {theirs}")
        return checkpoint.folder

    def shaped_by(self, row: CommandRow, next_seq: int) -> RunRow | None:
        """The run as it is made by the load that it begins with, should that change its adapter."""
        if not self.begins_with(row, next_seq):
            return None
        run = self._runs[RunId(row.lane)]
        source = self._runs[self.readable(run.tenant, row.arguments.path, "training").run].lora
        comes = {name: getattr(source, name) for name in _COMES_WITH_WEIGHTS}
        lora = msgspec.structs.replace(run.lora, **comes)
        return None if lora == run.lora else replace(run, lora=lora)

    def saving(self, row: CommandRow) -> None:
        """A save of a training state was accepted: its name is taken, and loads behind it find its folder."""
        if row.kind == "save_state" and row.folder is not None:
            path = checkpoint_path(RunId(row.lane), "training", row.arguments.name)
            self._saving.setdefault(path, {})[row.seq] = row.folder

    def saved(self, row: CommandRow) -> None:
        """It is over, with or without a checkpoint."""
        if row.kind == "save_state" and row.folder is not None:
            path = checkpoint_path(RunId(row.lane), "training", row.arguments.name)
            self._saving.get(path, {}).pop(row.seq, None)
            if not self._saving.get(path, True):
                del self._saving[path]

    def checkpoints_of(self, tenant: TenantId, run: RunId | None = None) -> list[CheckpointRow]:
        """Those with a name."""
        mine = (c for c in self._checkpoints.values() if c.tenant == tenant and not c.ephemeral)
        return [c for c in mine if run in (None, c.run) and not self._is_over(c)]

    def named(self, path: str) -> CheckpointRow | None:
        """Whoever's it is; one with a name of a user's choosing, which is not over."""
        row = self._unexpired(path)
        return None if row is None or row.ephemeral else row

    def expired(self) -> list[CheckpointRow]:
        return [c for c in self._checkpoints.values() if self._is_over(c)]

    def _unexpired(self, path: str) -> CheckpointRow | None:
        row = self._checkpoints.get(path)
        return None if row is None or self._is_over(row) else row

    def _is_over(self, checkpoint: CheckpointRow) -> bool:
        return checkpoint.expires_at is not None and checkpoint.expires_at <= self._now()


def _nobody(tenant: TenantId, what: Change) -> None:
    pass
