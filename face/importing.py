"""What `lorry import` does: an adapter that was trained elsewhere becomes checkpoints of a tenant's."""

import secrets
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from anyio import to_thread

from lorry.actors.adapters.checkpoints import save_without_moments
from lorry.actors.adapters.foreign import Foreign, read_foreign, said_base
from lorry.actors.model.loading import without_weights
from lorry.actors.model.lora import LoraTargets
from lorry.bases import base_folder
from lorry.client.operator import import_adapter
from lorry.keys import operator_key
from lorry.service import Service
from lorry.storage.checkpoints import imported_folder
from lorry.storage.holding import held
from lorry.wire.client_messages import AdapterImported, ImportAdapter
from lorry.wire.errors import InvalidRequestError, LorryError, StorageError
from lorry.wire.ids import RunId, TenantId


@dataclass(frozen=True, slots=True)
class Given:
    """An adapter's folder; whose it is to be, and under which name; the name that its base model is served under, None
    what the adapter calls it; and that model's folder or hub id, None the hub id that the name is."""

    folder: Path
    tenant: TenantId
    name: str
    model: str | None
    base: str | None


async def import_folder(given: Given, service: Service) -> AdapterImported:
    """Raises CheckpointError for an adapter that cannot be represented, UnsupportedModelError where its base is no
    model, StorageError where it cannot be written, and what `import_adapter` does. Then nothing was imported."""
    served = given.model or await to_thread.run_sync(said_base, given.folder)
    if served is None:
        raise InvalidRequestError.of(
            "model", None, "the name that the base model is served under: the adapter has none"
        )
    foreign, targets = await to_thread.run_sync(_read, given.folder, given.base, served)
    run = RunId("run-" + secrets.token_hex(8))
    folder = imported_folder(service.data / "checkpoints", run)
    with held(service.data):  # until the broker has recorded it, it is nobody's, and no sweep may find it
        try:
            facts = await to_thread.run_sync(partial(save_without_moments, foreign.adapter, targets, folder, served))
            order = ImportAdapter(
                request=1,
                operator_key=operator_key(service.data),
                run=run,
                tenant=given.tenant,
                base_model=served,
                lora=foreign.lora,
                name=given.name,
                size_bytes=facts.size_bytes,
                checksum=facts.sha256,
            )
            return await import_adapter(service.address, service.server_key, order)
        except (LorryError, OSError) as error:
            shutil.rmtree(folder.parent.parent, ignore_errors=True)
            if isinstance(error, OSError):
                raise StorageError(f"{folder} could not be written: {error}") from error
            raise


def _read(folder: Path, base: str | None, served: str) -> tuple[Foreign, LoraTargets]:
    targets = LoraTargets.of(without_weights(base_folder(base, served, weights=False)), dtype=torch.float32)
    return read_foreign(folder, targets), targets
