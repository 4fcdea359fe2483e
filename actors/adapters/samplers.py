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
    model: LoraTargets
    base_model: str

    def adapter(self, dtype: torch.dtype = torch.float32) -> Adapter:
        """For sampling."""
        return Adapter(self.spec, self.targets, dtype=dtype, trainable=False, weights=self.weights)

    def write(self) -> "Saved":
        """From any thread."""
        try:
            facts = save_sampler_weights(self.adapter(), self.model, Path(self.folder), self.base_model)
        except OSError as error:
            problem = StorageError(f"save_weights_for_sampler in {self.folder}: {error}")
            return Saved(self.run, self.folder, Outcome(self.future, problem.info))
        outcome = Outcome(self.future, size_bytes=facts.size_bytes, checksum=facts.sha256)
        return Saved(self.run, self.folder, outcome)


@dataclass(frozen=True, slots=True)
class Saved:
    """How a command ended whose folder was written beside the compute thread."""

    run: str
    folder: str
    outcome: Outcome
