"""Weights to sample from: a copy in memory, which is written while training goes on, and then sampled from as it is."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...wire.actor_messages import Outcome
from ...wire.errors import StorageError
from ...wire.ids import FutureId
from ..model.adapter import Adapter
from ..model.lora import LoraTargets
from ..model.spec import AdapterSpec, Target
from .checkpoints import save_sampler_weights


@dataclass(frozen=True, slots=True)
class SamplerSave:
    """What a run's command is to leave in `folder`: its weights as they are now, [P] float32 on the host. They never
    change, so whoever samples from them and whoever writes them share them."""

    run: str
    future: FutureId
    folder: str
    spec: AdapterSpec
    targets: tuple[Target, ...]
    weights: Tensor

    def adapter(self, dtype: torch.dtype = torch.float32) -> Adapter:
        """For sampling."""
        return Adapter(self.spec, self.targets, dtype=dtype, trainable=False, weights=self.weights)


@dataclass(frozen=True, slots=True)
class SamplerSaved:
    run: str
    folder: str
    outcome: Outcome


def sampler_save(run: str, future: FutureId, folder: str, adapter: Adapter) -> SamplerSave:
    return SamplerSave(run, future, folder, adapter.spec, adapter.targets, adapter.weights_copy())


def write_sampler_weights(save: SamplerSave, targets: LoraTargets, base_model: str) -> SamplerSaved:
    """From any thread."""
    try:
        facts = save_sampler_weights(save.adapter(), targets, Path(save.folder), base_model)
    except OSError as error:
        problem = StorageError(f"save_weights_for_sampler in {save.folder}: {error}")
        return SamplerSaved(save.run, save.folder, Outcome(save.future, problem.info))
    return SamplerSaved(save.run, save.folder, Outcome(save.future, size_bytes=facts.size_bytes, checksum=facts.sha256))
