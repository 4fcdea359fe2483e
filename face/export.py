"""What `lorry export` does: a checkpoint's adapter leaves the data, as a folder for PEFT or as a model."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog
import torch

from lorry.actors.export.folders import (
    base_name,
    convert_adapter,
    copy_adapter,
    is_as_pefts,
    merge_adapter,
    trains_head,
)
from lorry.administration import changing
from lorry.backup import check_new
from lorry.bases import base_folder
from lorry.plan import floating
from lorry.storage.audit import OPERATOR
from lorry.storage.checkpoints import place_of
from lorry.storage.holding import held
from lorry.storage.looking import looking
from lorry.wire.errors import InvalidRequestError, NotFoundError, StorageUnavailableError
from lorry.wire.types import AuditEvent

log = structlog.get_logger("lorry")

TIED = (
    "It trains the output head. Where the base ties that to its embeddings, merge with `lorry export --merge`, which "
    "gives the head weights of its own: a merge that leaves them tied changes the embeddings, too."
)


@dataclass(frozen=True, slots=True)
class Merge:
    """`dtype` is that of the merged weights, None the base's own."""

    dtype: str | None


def export(data: Path, path: str, destination: Path, base: str | None, merge: Merge | None) -> str | None:
    """Writes the adapter of the checkpoint `path` to `destination`, while the service runs or not. `base` is a folder
    or a hub id, None the hub id that the model is served under. Returns what its user ought to know.

    Raises NotFoundError where there is no such checkpoint, InvalidRequestError where the destination is taken or cannot
    be written, CheckpointError where the checkpoint is damaged or fits no `base`, and UnsupportedModelError where that
    is no model.
    """
    check_new(destination, "destination")
    dtype = None if merge is None or merge.dtype is None else floating(merge.dtype)
    try:
        return _export(data, path, destination, base, dtype, merges=merge is not None)
    except OSError as error:
        message = f"destination is {str(destination)!r}, which could not be written: {error}"
        raise InvalidRequestError(message, field="destination") from error


def _export(
    data: Path, path: str, destination: Path, base: str | None, dtype: torch.dtype | None, *, merges: bool
) -> str | None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as aside:
        source = Path(aside) / "adapter"
        with _folder_of(data, path) as folder:
            copy_adapter(folder, source)
        if merges:
            merge_adapter(source, destination, base_folder(base, base_name(source)), dtype)
            return None
        if is_as_pefts(source):
            copy_adapter(source, destination)
        else:
            convert_adapter(source, destination, base_folder(base, base_name(source)))
        return TIED if trains_head(source) else None


def _tell(data: Path, did: AuditEvent) -> None:
    """A backup may lie on a medium that takes no writes, and has nobody's audit log."""
    try:
        with changing(data) as store:
            store.audited(did)
    except (StorageUnavailableError, OSError) as error:
        log.warning("the audit log was not told", why=str(error))


@contextmanager
def _folder_of(data: Path, path: str) -> Generator[Path]:
    """It is not deleted meanwhile, nor is anything else: what takes long is done with a copy."""
    with held(data):
        with looking(data) as store:
            found = next((row for row in store.checkpoints() if row.path == path), None)
        if found is None:
            raise NotFoundError(f"path is {path!r}, expected that of a checkpoint in {data}", field="path")
        _tell(data, AuditEvent(time.time(), found.tenant, OPERATOR, "checkpoint_exported", path))
        yield data / "checkpoints" / Path(*place_of(Path(found.folder)))
