"""Adapters from elsewhere, in PEFT's folders: what Lorry can represent, exactly, and what is refused by name.

Nothing is unpickled, and nothing of a base model is read but its configuration.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...wire.errors import CheckpointError
from ...wire.types import LoraConfig
from ..model.adapter import Adapter
from ..model.lora import LoraTargets
from ..model.spec import AdapterSpec
from .checkpoints import CONFIG, WEIGHTS, fill, read_factors
from .folders import read_json
from .layouts import is_shared

_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_PLAIN_STARTS = (True, False, "default", "gaussian", "orthogonal", "eva")
"""What A and B begin as. All other ways of PEFT's take something out of the base's weights."""
_READ = frozenset(("peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights", "base_model_name_or_path"))
_SAYS_NOTHING_MORE = frozenset(
    (
        "auto_mapping",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "target_parameters",
        "task_type",
    )
)
"""How it came to be, and which layers it trains, which its factors say, too."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """An adapter from elsewhere, on the host and in float32, and what a run has to be to go on with it."""

    lora: LoraConfig
    adapter: Adapter


def said_base(folder: Path) -> str | None:
    """What the base model was to who trained the adapter. Raises CheckpointError where `folder` is none's."""
    return _config(folder).get("base_model_name_or_path")


def read_foreign(folder: Path, targets: LoraTargets) -> Foreign:
    """Raises CheckpointError, which names the file and the setting or the factor, for what cannot be represented."""
    config, path = _config(folder), folder / WEIGHTS
    rank, alpha = _checked(folder / CONFIG, config)
    factors, left = read_factors(path, targets.modules)
    left = {name: tensor for name, tensor in left.items() if not _is_copy_of_base(name, tensor, targets)}
    if left:
        raise CheckpointError(f"{path} has {min(left)}, which no layer that adapters of this base model train has")
    if not factors:
        raise CheckpointError(f"{path} has no factors at all")
    chosen = [target for target in targets.modules if target.name in factors]
    groups, names = {target.group for target in chosen}, targets.names_of(chosen)
    lora = LoraConfig(
        rank=rank,
        seed=0,
        train_mlp="mlp" in groups,
        train_attn="attn" in groups,
        train_unembed="unembed" in groups,
        expert_lora="shared" if is_shared(factors, chosen) else "independent",
        alpha=alpha,
        target_modules=None if names is None else list(names),
    )
    spec = AdapterSpec(rank=rank, alpha=alpha, expert_lora=lora.expert_lora)
    adapter = Adapter(spec, chosen, trainable=False)
    fill(adapter, path, factors)
    if not adapter.weights.isfinite().all():
        raise CheckpointError(f"{path} has factors that are not finite")
    return Foreign(lora, adapter)


def _config(folder: Path) -> dict[str, Any]:
    pickled = next((name for name in _PICKLES if (folder / name).exists()), None)
    if pickled is not None and not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder / pickled} is a pickle, which may run code: save it as {WEIGHTS}")
    return read_json(folder / CONFIG)


def _is_copy_of_base(name: str, tensor: Tensor, targets: LoraTargets) -> bool:
    """PEFT puts embeddings and head into the file, whole, where it trains a factor of one."""
    shapes = [(target.outputs, target.inputs) for target in targets.modules if target.group == "unembed"]
    return name.endswith(".weight") and ".lora_" not in name and tuple(tensor.shape) in shapes


def _checked(path: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank, and the alpha with which alpha / rank is the scale."""
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{path} has peft_type {config['peft_type']!r}, expected 'LORA'")
    if (start := config.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path} has init_lora_weights {start!r}, which changes the base model's weights: save it with PEFT's"
            " path_initial_model_for_weight_conversion"
        )
    for name, value in sorted(config.items()):
        if name not in _READ | _SAYS_NOTHING_MORE and value and value != "none":
            raise CheckpointError(f"{path} has {name} {value!r}, which no adapter of Lorry's has")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"{path} has r {rank!r}, expected a whole number from 1")
    if not isinstance(alpha, int | float) or not (math.isfinite(alpha) and alpha > 0):
        raise CheckpointError(f"{path} has lora_alpha {alpha!r}, expected a number above 0")
    return rank, float(alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)
