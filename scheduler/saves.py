"""What a save makes: its path, its folder, the rows that record it, and what is answered. Pure."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..storage.rows import CheckpointKind, CheckpointRow, CommandRow, RunRow, SamplerRow
from ..wire.actor_messages import Outcome
from ..wire.commands import CommandKind
from ..wire.errors import NotFoundError
from ..wire.ids import RunId, SamplerId
from ..wire.types import LoadWeightsResponse, SaveWeightsForSamplerResponse, SaveWeightsResponse
from .registry import checkpoint_path, ephemeral_path, sampler_in_slot

SAVES: frozenset[CommandKind] = frozenset(("save_state", "save_weights_for_sampler"))

_EPHEMERAL_TTL_S = 24 * 3600
"""How long weights without a name can be found: a training loop makes new ones at every step."""
NEWEST_KEPT = 4
ASKED_WITHIN_S = 600.0
"""Weights without a name outlive so many newer ones of their run where they were asked since the first of those was
saved, or within this time."""


def saved_path(row: CommandRow) -> str:
    """Where a save puts its checkpoint. Raises InvalidRequestError for a name that cannot be one."""
    if is_ephemeral(row):
        return ephemeral_path(RunId(row.lane), row.seq)
    return checkpoint_path(RunId(row.lane), saved_kind(row), row.arguments.name)


def is_ephemeral(row: CommandRow) -> bool:
    """Whether a save makes weights without a name."""
    return row.arguments.sampler_slot is not None or (row.kind == "save_weights_for_sampler" and row.arguments.unnamed)


def saved_kind(row: CommandRow) -> CheckpointKind:
    if row.kind == "save_state":
        return "training"
    return "external" if row.arguments.external else "sampler"


def saved_folder(row: CommandRow, checkpoints: Path) -> str:
    """A folder for each save, never written twice: a crash between its renaming and the commit of its row leaves what
    was saved before as it was, and what an actor has loaded from a folder never goes stale."""
    return str(checkpoints / f"{saved_path(row).removeprefix('tinker://')}.{row.seq}")


def saved_checkpoint(
    row: CommandRow, run: RunRow, outcome: Outcome, now: float, kept_for_s: int | None = None
) -> CheckpointRow:
    """`kept_for_s` is for how long, where the save did not say."""
    ephemeral = is_ephemeral(row) and row.arguments.ttl_seconds is None
    ttl = row.arguments.ttl_seconds or (_EPHEMERAL_TTL_S if ephemeral else kept_for_s)
    assert row.folder is not None, "named when the save was accepted"
    return CheckpointRow(
        path=saved_path(row),
        run=run.id,
        tenant=run.tenant,
        kind=saved_kind(row),
        name=row.arguments.name or "",
        folder=row.folder,
        seq=row.seq,
        size_bytes=outcome.size_bytes,
        checksum=outcome.checksum,
        created_at=now,
        expires_at=None if ttl is None else now + ttl,
        ephemeral=ephemeral,
        user_metadata=row.arguments.user_metadata,
    )


def older_than_newest(checkpoints: Iterable[CheckpointRow], saved: CheckpointRow, keeps: int) -> list[CheckpointRow]:
    """Of a run's checkpoints with names, of the same kind as the one that was `saved`, all but the newest `keeps`, and
    those that are public."""
    others = [each for each in checkpoints if each.kind == saved.kind and each.path != saved.path and not each.public]
    return sorted(others, key=lambda each: (each.created_at, each.seq), reverse=True)[max(0, keeps - 1) :]


def saved_sampler(row: CommandRow, run: RunRow, now: float) -> SamplerRow | None:
    """The sampler of the weights that this command saved; None where it was not asked for."""
    slot = row.arguments.sampler_slot
    if run.session is None or slot is None:
        return None
    sampler = SamplerId(sampler_in_slot(run.session, slot))
    return SamplerRow(
        id=sampler,
        tenant=run.tenant,
        nonce=sampler,
        base_model=run.base_model,
        model_path=saved_path(row),
        created_at=now,
        session=run.session,
        folder=row.folder,
        project=run.project,
        in_flight=row.arguments.in_flight,
    )


def moved_to(sampler: SamplerRow, row: CommandRow) -> SamplerRow:
    """With the weights that this command saved."""
    return replace(sampler, model_path=saved_path(row), folder=row.folder, outlived=False)


def weights_gone(sampler: SamplerRow) -> NotFoundError:
    problem = (
        f"the weights of sampler {sampler.id!r} are gone: they have no name, their run saved {NEWEST_KEPT} newer ones, "
        f"and nobody had asked it since, nor for {ASKED_WITHIN_S / 60:.0f} minutes. Weights with a name are kept"
    )
    return NotFoundError(problem, field="sampler")


def weights_response(row: CommandRow, sampler: SamplerRow | None) -> object:
    """What a save or a load answers."""
    if row.kind == "load_state":
        return LoadWeightsResponse(row.arguments.path or "")
    if row.kind == "save_state":
        return SaveWeightsResponse(saved_path(row))
    return SaveWeightsForSamplerResponse(saved_path(row), sampler.id if sampler else None)
