"""What a training pass of a model will hold, from its configuration alone: some of its layers, without weights, are
metered on the meta device."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedConfig

from ..model.base_model import BaseModel, outline
from ..model.lora import LoraTargets, attach_lora
from ..model.recomputing import Bytes, PassCost
from .pass_cost import measure_pass

Share: TypeAlias = Callable[[BaseModel, LoraTargets], tuple[BaseModel, LoraTargets]]
"""What one of several devices has of an outline."""


def foresee_pass(config: PreTrainedConfig, dtype: torch.dtype, share: Share | None = None) -> PassCost:
    """Of all its layers, the last of which are alike. Scores that attention keeps are left out, as kernels for
    accelerators keep none. Where several devices `share` the model, on each of them.

    Raises ValueError where transformers has no such decoder.
    """
    text = config.get_text_config()
    dense = getattr(text, "first_k_dense_replace", 0) or 0
    few = min(dense + 1, text.num_hidden_layers)
    if text.num_hidden_layers <= few + 1:
        return _flash(_of_layers(config, text.num_hidden_layers, dtype, share))
    one, two = (_of_layers(config, layers, dtype, share) for layers in (few, few + 1))
    more = text.num_hidden_layers - few - 1
    held, again = _minus(two.held, one.held), _minus(two.held_again, one.held_again)
    cost = PassCost(
        text.num_hidden_layers,
        _plus(two.held, held, more),
        _plus(two.most, held, more),
        _plus(two.held_again, again, more),
        _plus(two.most_again, again, more),
    )
    return _flash(cost)


def _of_layers(config: PreTrainedConfig, layers: int, dtype: torch.dtype, share: Share | None) -> PassCost:
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    base = outline(config, dtype)
    targets = attach_lora(base)
    return measure_pass(*((base, targets) if share is None else share(base, targets)))


def _flash(cost: PassCost) -> PassCost:
    each = {name: getattr(cost, name) for name in ("held", "most", "held_again", "most_again")}
    return replace(cost, **{name: replace(b, square=0.0) for name, b in each.items() if b.block is None})


def _minus(one: Bytes, other: Bytes) -> Bytes:
    return Bytes(one.token - other.token, one.square - other.square)


def _plus(one: Bytes, other: Bytes, times: int) -> Bytes:
    return Bytes(one.token + times * other.token, one.square + times * other.square, one.block)
