"""What of a base model adapters may train: its attention, its MLPs with their experts, and its output head.

Read off the modules' names and kinds. Changes nothing, so that a model without weights will do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ...wire.errors import UnsupportedModelError
from .spec import ExpertWeight, Group, Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = frozenset(("self_attn", "attn", "attention", "self_attention"))
_MLP = frozenset(("mlp", "feed_forward", "ffn"))
_ROUTERS = frozenset(("gate", "router", "shared_expert_gate"))
EYES = frozenset(("visual", "vision_tower", "vision_model"))
"""Towers that see: they stay frozen, as on the hosted service."""


@dataclass(frozen=True, slots=True)
class Site:
    """A module, and what of it adapters may train: its weight, or both of routed experts'."""

    module: nn.Module
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Sites:
    """In model order. `frozen_experts` names a class of routed experts that adapters cannot train, and so no MLP of the
    model's."""

    each: tuple[Site, ...]
    frozen_experts: str | None

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(target for site in self.each for target in site.targets)


def find_sites(model: "PreTrainedModel") -> Sites:
    """Raises UnsupportedModelError where attention projections or output head are not `nn.Linear`."""
    mixtures = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"]
    frozen = next((type(module).__name__ for module in mixtures if not are_routed_experts(module)), None)
    sites: list[Site] = []
    index = 0
    for name, module, group in _grouped(model):
        if group == "mlp" and frozen:
            continue
        if module in mixtures:
            targets = _of_experts(name, module, index, as_modules=_are_modules_in_files(model))
        elif isinstance(module, nn.Linear):
            targets = (Target(index, name, module.in_features, module.out_features, group),)
        else:
            continue
        sites.append(Site(module, targets))
        index += len(targets)
    if not {"attn", "unembed"} <= {target.group for site in sites for target in site.targets}:
        raise UnsupportedModelError(f"{type(model).__name__} has no nn.Linear attention projections and output head")
    return Sites(tuple(sites), frozen)


def are_routed_experts(module: nn.Module) -> bool:
    """Whether transformers' interface computes them, and as those of Qwen3-MoE, GPT-OSS and DeepSeek-V3: two products
    with a gate between them, and nothing behind."""
    names = ("gate_up_proj", "down_proj", "is_transposed", "has_bias", "_apply_gate")
    return all(hasattr(module, name) for name in names) and not getattr(module, "has_post_expert_norm", False)


def _grouped(model: "PreTrainedModel") -> Iterator[tuple[str, nn.Module, Group]]:
    """By the module's path: layers.3.self_attn.q_proj is attention, layers.3.mlp.up_proj is MLP."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        *path, leaf = name.split(".")
        if module is head:
            yield name, module, "unembed"
        elif leaf in _ROUTERS or EYES.intersection(path):
            continue
        elif _ATTENTION.intersection(path):
            yield name, module, "attn"
        elif _MLP.intersection(path):
            yield name, module, "mlp"


def block_of(name: str) -> str:
    """Of a layer of attention or of an MLP, the path of the whole."""
    path = name.split(".")
    return ".".join(path[: 1 + next(i for i, part in enumerate(path) if part in _ATTENTION | _MLP)])


def _of_experts(name: str, module: nn.Module, index: int, *, as_modules: bool) -> tuple[Target, Target]:
    """gate_up [experts, outputs, inputs] and down, or transposed."""
    gate_up, down = (tuple(getattr(module, leaf).shape) for leaf in ("gate_up_proj", "down_proj"))
    axes = (1, 2) if module.is_transposed else (2, 1)  # of inputs and outputs
    interleaved = not getattr(module, "is_concatenated", not module.is_transposed)  # older ones do not say
    of_gate_up = ExpertWeight(gate_up[0], "a", interleaved, as_modules, bool(module.is_transposed))
    of_down = ExpertWeight(down[0], "b", interleaved, as_modules, bool(module.is_transposed))
    return (
        Target(index, f"{name}.gate_up_proj", gate_up[axes[0]], gate_up[axes[1]], "mlp", of_gate_up),
        Target(index + 1, f"{name}.down_proj", down[axes[0]], down[axes[1]], "mlp", of_down),
    )


def _are_modules_in_files(model: "PreTrainedModel") -> bool:
    """Whether the family's checkpoints have a layer for each expert, which transformers fuses, and PEFT with it."""
    conversions = get_checkpoint_conversion_mapping(model.config.model_type) or ()
    return any("mlp.experts.*.gate_proj.weight" in conversion.source_patterns for conversion in conversions)
