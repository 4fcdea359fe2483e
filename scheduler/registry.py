"""What exists: runs, samplers, checkpoints and models, and who may see them. Pure look-ups over rows; no I/O.

Anything that is not the asking tenant's does not exist for it: the answer is the same, so nothing can be guessed.
"""

import re
from collections.abc import Iterable

from ..storage.rows import CheckpointKind, CheckpointRow, RunRow, SamplerRow
from ..wire.actor_messages import ModelFacts
from ..wire.errors import InvalidRequestError, NotFoundError, UnknownModelError
from ..wire.ids import LaneId, RunId, SamplerId, TenantId

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SEGMENTS: dict[CheckpointKind, str] = {
    "training": "weights",
    "sampler": "sampler_weights",
    "external": "external_weights",
}


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


class Registry:
    def __init__(self, models: Iterable[str]) -> None:
        self._models: dict[str, tuple[ModelFacts, int] | None] = dict.fromkeys(models)
        self._runs: dict[RunId, RunRow] = {}
        self._samplers: dict[SamplerId, SamplerRow] = {}
        self._nonces: dict[tuple[TenantId, str], RunRow | SamplerRow] = {}
        self._checkpoints: dict[str, CheckpointRow] = {}

    # Models ----------------------------------------------------------------------------------------------------------

    def model_seen(self, name: str, facts: ModelFacts, max_rank: int) -> None:
        self._models[name] = facts, max_rank

    def serves(self, name: str) -> bool:
        return name in self._models

    def facts(self, name: str) -> tuple[ModelFacts, int]:
        """A model's facts and the largest rank its actors take."""
        if name not in self._models:
            served = ", ".join(self._models) or "none"
            raise UnknownModelError(f"base_model is {name!r}, served are: {served}", field="base_model")
        if (known := self._models[name]) is None:
            raise UnknownModelError(f"base_model {name!r} is still being loaded", field="base_model")
        return known

    def ready_models(self) -> dict[str, ModelFacts]:
        return {name: known[0] for name, known in self._models.items() if known}

    # Runs and samplers -----------------------------------------------------------------------------------------------

    def add_run(self, run: RunRow) -> None:
        self._runs[run.id] = self._nonces[run.tenant, run.nonce] = run

    def add_sampler(self, sampler: SamplerRow) -> None:
        self._samplers[sampler.id] = self._nonces[sampler.tenant, sampler.nonce] = sampler

    def made_before(self, tenant: TenantId, nonce: str) -> RunRow | SamplerRow | None:
        return self._nonces.get((tenant, nonce))

    def run(self, tenant: TenantId, run: str | None) -> RunRow:
        row = self._runs.get(RunId(run or ""))
        if row is None or row.tenant != tenant:
            raise NotFoundError(f"there is no run {run!r}", field="run")
        return row

    def sampler(self, tenant: TenantId, sampler: str | None) -> SamplerRow:
        row = self._samplers.get(SamplerId(sampler or ""))
        if row is None or row.tenant != tenant:
            raise NotFoundError(f"there is no sampler {sampler!r}", field="sampler")
        return row

    def lane(self, tenant: TenantId, lane: LaneId) -> RunRow | SamplerRow:
        if RunId(lane) in self._runs:
            return self.run(tenant, lane)
        return self.sampler(tenant, lane)

    def run_of(self, lane: LaneId) -> RunRow | None:
        return self._runs.get(RunId(lane))

    def sampler_of(self, lane: LaneId) -> SamplerRow | None:
        return self._samplers.get(SamplerId(lane))

    def runs_of(self, tenant: TenantId) -> list[RunRow]:
        return [run for run in self._runs.values() if run.tenant == tenant]

    def samplers_of(self, tenant: TenantId) -> list[SamplerRow]:
        return [sampler for sampler in self._samplers.values() if sampler.tenant == tenant]

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def add_checkpoint(self, checkpoint: CheckpointRow) -> None:
        self._checkpoints[checkpoint.path] = checkpoint

    def remove_checkpoint(self, path: str) -> None:
        self._checkpoints.pop(path, None)

    def checkpoint(self, tenant: TenantId, path: str | None) -> CheckpointRow:
        """One of the tenant's own."""
        row = self._checkpoints.get(path or "")
        if row is None or row.tenant != tenant:
            raise NotFoundError(f"there is no checkpoint {path!r}", field="path")
        return row

    def readable(self, tenant: TenantId, path: str | None, kind: CheckpointKind | None = None) -> CheckpointRow:
        """One of the tenant's own, or a public one."""
        row = self._checkpoints.get(path or "")
        if row is None or not (row.public or row.tenant == tenant):
            raise NotFoundError(f"there is no checkpoint {path!r}", field="path")
        if kind is not None and row.kind != kind:
            verb = "save_state" if kind == "training" else "save_weights_for_sampler"
            raise InvalidRequestError.of("path", path, f"a checkpoint made by {verb}")
        return row

    def existing(self, path: str) -> CheckpointRow | None:
        return self._checkpoints.get(path)

    def loadable(self, run: RunRow, path: str | None) -> CheckpointRow:
        """The training checkpoint at `path`, if its adapter has the shape of `run`'s."""
        checkpoint = self.readable(run.tenant, path, "training")
        source, shape = self._runs[checkpoint.run], ("rank", "train_attn", "train_mlp", "train_unembed")
        if source.base_model != run.base_model:
            raise InvalidRequestError.of("path", path, f"a checkpoint of {run.base_model}, not {source.base_model}")
        for name in shape:
            theirs, ours = getattr(source.lora, name), getattr(run.lora, name)
            if theirs != ours:
                raise InvalidRequestError.of("path", path, f"a checkpoint with {name} {ours}, its own is {theirs}")
        return checkpoint

    def checkpoints_of(self, tenant: TenantId, run: RunId | None = None) -> list[CheckpointRow]:
        """Those with a name."""
        mine = (c for c in self._checkpoints.values() if c.tenant == tenant and not c.ephemeral)
        return [c for c in mine if run in (None, c.run)]

    def expired(self, now: float) -> list[CheckpointRow]:
        return [c for c in self._checkpoints.values() if c.expires_at is not None and c.expires_at <= now]
