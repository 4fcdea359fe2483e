"""The operators of `operators` where a gradient is wanted: each has another for its backward.

A graph of a layer's forward and one of its backward call them, and look into neither. What a backward wants that no
graph may see, LoRA's narrow products and autograd's record of attention and of experts, stays with the model's
`DecoderLayers`. Which layer is under way is a tensor to a graph, so that one graph serves all layers of a kind.
"""

from typing import Any, cast

import torch
from torch import Tensor

from .in_flight import DecoderLayers, InFlight

_library = torch.library.Library("lorry", "FRAGMENT")
_library.define("linear_forward(Tensor x, Tensor place, int model, int role, int outputs) -> Tensor")
_library.define("linear_backward(Tensor dy, Tensor x, Tensor place, int model, int role) -> Tensor")
_library.define(
    "attend_forward(Tensor query, Tensor key, Tensor value, Tensor place, int model, float scaling, "
    "int? sliding_window, Tensor? sinks) -> Tensor"
)
_library.define(
    "attend_backward(Tensor dy, Tensor place, int model, SymInt[] query, SymInt[] key, SymInt[] value) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define("experts_forward(Tensor hidden, Tensor chosen, Tensor counted, Tensor place, int model) -> Tensor")
_library.define("experts_backward(Tensor dy, Tensor counted, Tensor place, int model) -> (Tensor, Tensor)")
_operators = cast(Any, torch.ops.lorry)


def linear(x: Tensor, in_flight: InFlight, index: int, outputs: int) -> Tensor:
    """As `DecoderLayers.linear`, of the layer that is under way."""
    layers = _of(in_flight)
    return _Linear.apply(x, layers.place, in_flight.number, layers.roles[index], outputs)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    in_flight: InFlight,
    scaling: float,
    sliding_window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """As `DecoderLayers.attend`, of the layer that is under way."""
    place = _of(in_flight).place
    return _Attention.apply(query, key, value, place, in_flight.number, scaling, sliding_window, sinks)


def experts(hidden: Tensor, chosen: Tensor, counted: Tensor, in_flight: InFlight) -> Tensor:
    """As `DecoderLayers.experts`, of the layer that is under way."""
    return _Experts.apply(hidden, chosen, counted, _of(in_flight).place, in_flight.number)


def _of(in_flight: InFlight) -> DecoderLayers:
    assert in_flight.layers is not None, "with a gradient only whole layers are compiled"
    return in_flight.layers


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, model: int, role: int, outputs: int) -> Tensor:
        ctx.save_for_backward(x, place)
        ctx.rest = model, role
        return _operators.linear_forward(x, place, model, role, outputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, place = ctx.saved_tensors
        return _operators.linear_backward(dy, x, place, *ctx.rest), None, None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor,
        model: int,
        scaling: float,
        sliding_window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rest = model, query.shape, key.shape, value.shape
        return _operators.attend_forward(query, key, value, place, model, scaling, sliding_window, sinks)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (place,) = ctx.saved_tensors
        return *_operators.attend_backward(dy, place, *ctx.rest), None, None, None, None, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, chosen: Tensor, counted: Tensor, place: Tensor, model: int) -> Tensor:
        ctx.save_for_backward(counted, place)
        ctx.model = model
        return _operators.experts_forward(hidden, chosen, counted, place, model)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        counted, place = ctx.saved_tensors
        d_hidden, d_counted = _operators.experts_backward(dy, counted, place, ctx.model)
        return d_hidden, None, d_counted, None, None


def _layers(model: int) -> DecoderLayers:
    return _of(InFlight.of(model))


def _linear_forward(x: Tensor, place: Tensor, model: int, role: int, outputs: int) -> Tensor:
    return _layers(model).linear(int(place), role, x)


def _linear_backward(dy: Tensor, x: Tensor, place: Tensor, model: int, role: int) -> Tensor:
    return _layers(model).linear_backward(int(place), role, dy, x)


def _attend_forward(query: Tensor, key: Tensor, value: Tensor, place: Tensor, model: int, *rest: Any) -> Tensor:
    return _layers(model).attend(int(place), query, key, value, *rest)


def _attend_backward(dy: Tensor, place: Tensor, model: int, *_: object) -> tuple[Tensor, ...]:
    return _layers(model).attend_backward(int(place), dy)


def _experts_forward(hidden: Tensor, chosen: Tensor, counted: Tensor, place: Tensor, model: int) -> Tensor:
    return _layers(model).experts(int(place), hidden, chosen, counted)


def _experts_backward(dy: Tensor, counted: Tensor, place: Tensor, model: int) -> tuple[Tensor, ...]:
    return _layers(model).experts_backward(int(place), dy)


def _shape_of_linear(x: Tensor, place: Tensor, model: int, role: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _shape_of_x(dy: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _shape_of_attend(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _shapes_of_heads(
    dy: Tensor, place: Tensor, model: int, query: list[int], key: list[int], value: list[int]
) -> tuple[Tensor, ...]:
    return dy.new_empty(query), dy.new_empty(key), dy.new_empty(value)


def _shape_of_experts(hidden: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _shapes_of_choices(dy: Tensor, counted: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), counted.new_empty(counted.shape)


for _name, _function, _shape in (
    ("linear_forward", _linear_forward, _shape_of_linear),
    ("linear_backward", _linear_backward, _shape_of_x),
    ("attend_forward", _attend_forward, _shape_of_attend),
    ("attend_backward", _attend_backward, _shapes_of_heads),
    ("experts_forward", _experts_forward, _shape_of_experts),
    ("experts_backward", _experts_backward, _shapes_of_choices),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorry::{_name}", _shape, lib=_library)
