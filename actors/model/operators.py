"""Attention and the trainable layers as operators of their own: what `torch.compile` calls and does not look into.

So one compiled graph serves steps of any rows, prompts and adapters. Each operator finds its model's batch in flight by
number, since tensors and numbers are all that may be handed to it. Where a gradient is wanted, `trained_operators` are
called in their place.
"""

from typing import Any, cast

import torch
from torch import Tensor

from . import trained_operators
from .in_flight import InFlight

_library = torch.library.Library("lorry", "DEF")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, int model, int layer, float scaling, int? sliding_window, "
    "Tensor? sinks) -> Tensor"
)
_library.define("linear(Tensor x, int model, int index, int outputs) -> Tensor")
_library.define("experts(Tensor hidden, Tensor chosen, Tensor counted, int model, int index) -> Tensor")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    in_flight: InFlight,
    layer: int,
    scaling: float,
    sliding_window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """As `AttentionCache.attend`, but [1, tokens, heads, value_dim] comes back."""
    if torch.is_grad_enabled():
        return trained_operators.attend(query, key, value, in_flight, scaling, sliding_window, sinks)
    operator = cast(Any, torch.ops.lorry.attend)
    return operator(query, key, value, in_flight.number, layer, scaling, sliding_window, sinks)


def linear(x: Tensor, in_flight: InFlight, index: int, outputs: int) -> Tensor:
    """As `Linears.linear`."""
    if torch.is_grad_enabled():
        return trained_operators.linear(x, in_flight, index, outputs)
    return cast(Any, torch.ops.lorry.linear)(x, in_flight.number, index, outputs)


def experts(hidden: Tensor, chosen: Tensor, counted: Tensor, in_flight: InFlight, index: int) -> Tensor:
    """As `Linears.experts`."""
    if torch.is_grad_enabled():
        return trained_operators.experts(hidden, chosen, counted, in_flight)
    return cast(Any, torch.ops.lorry.experts)(hidden, chosen, counted, in_flight.number, index)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    model: int,
    layer: int,
    scaling: float,
    sliding_window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    cache = InFlight.of(model).cache
    assert cache is not None, "without a gradient only steps of the decode loop are compiled"
    return cache.attend(layer, query, key, value, scaling, sliding_window, sinks).transpose(1, 2).contiguous()


def _shape_of_attend(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _linear(x: Tensor, model: int, index: int, outputs: int) -> Tensor:
    linears = InFlight.of(model).linears
    assert linears is not None, "without a gradient only steps of the decode loop are compiled"
    return linears.linear(index, x).contiguous()  # no view: the graph may use its memory again


def _shape_of_linear(x: Tensor, model: int, index: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _experts(hidden: Tensor, chosen: Tensor, counted: Tensor, model: int, index: int) -> Tensor:
    linears = InFlight.of(model).linears
    assert linears is not None, "without a gradient only steps of the decode loop are compiled"
    return linears.experts(index, hidden, chosen, counted).contiguous()


def _shape_of_experts(hidden: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden)


for _name, _function, _shape in (
    ("attend", _attend, _shape_of_attend),
    ("linear", _linear, _shape_of_linear),
    ("experts", _experts, _shape_of_experts),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorry::{_name}", _shape, lib=_library)
