"""The routed experts of a layer with LoRA: the one function that transformers calls in place of its own, for every
family whose experts are one module.

As in `lora`, the backward is written by hand: it computes no gradient for the base and adds the adapters' in place.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import operators
from .expert_lora import (
    Share,
    Shares,
    add_common_down,
    add_common_gate_up_backward,
    add_down,
    add_down_backward,
    add_gate_up,
    add_gate_up_backward,
)
from .in_flight import InFlight
from .nf4 import Stack, stacked
from .products import linear_of_each
from .routing import Routing, route

PACKED = "lorry"


class RoutedExperts:
    """Of one layer: `module` has the base's weights, `gate_up` and `down` are their places in model order.

    `targets.are_routed_experts` must hold of it.
    """

    def __init__(self, module: nn.Module, gate_up: int, down: int, in_flight: InFlight) -> None:
        self.module: Any = module
        self.gate_up, self.down, self.in_flight = gate_up, down, in_flight
        self.count = len(self.module.gate_up_proj)
        self._own: tuple[int, int] | None = None
        self._quantised: tuple[Stack, Stack] | None = None

    def keep_own(self, first: int, last: int) -> None:
        """The module has the weights of these alone from now on, the last not among them."""
        self._own = first, last

    def quantise(self) -> None:
        """The base's own weights go."""
        gate_up, down = self.weights
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor), "once"
        self._quantised = stacked(gate_up), stacked(down)
        for name in ("gate_up_proj", "down_proj"):
            parameter: nn.Parameter = getattr(self.module, name)
            parameter.data = parameter.new_empty(0)

    @property
    def weights(self) -> tuple[Tensor, Tensor] | tuple[Stack, Stack]:
        """[experts, outputs, inputs] each, of gate and up together, and of down."""
        if self._quantised is not None:
            return self._quantised
        gate_up, down = self.module.gate_up_proj, self.module.down_proj
        return (gate_up.mT, down.mT) if self.module.is_transposed else (gate_up, down)

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """[experts, outputs] each."""
        return (self.module.gate_up_proj_bias, self.module.down_proj_bias) if self.module.has_bias else (None, None)

    def activate(self, gate_up: Tensor) -> Tensor:
        """[pairs, outputs of gate and up] -> [pairs, inputs of down]."""
        return self.module._apply_gate(gate_up)

    def pause(self) -> None:
        """Between the products of a training pass. A decode step is what others do in such a pause."""
        if self.in_flight.linears is None:
            self.in_flight.pause()

    def compute(self, hidden: Tensor, chosen: Tensor, counted: Tensor) -> Tensor:
        """With the adapters in flight: hidden [tokens, hidden], chosen [tokens, choices] int64, and what each choice
        counts, [tokens, choices] -> [tokens, hidden]."""
        routes = self._routes(chosen)
        if torch.is_grad_enabled():
            return _Mixture.apply(hidden, counted, self, routes)
        return _forward(self, routes, hidden, counted)[0]

    def _routes(self, chosen: Tensor) -> "_Routes":
        """An adapter that trains experts trains both of their weights."""
        experts, spans = self.count, list[tuple[int, int]]()
        gate_up: list[Share] = []
        down: list[Share] = []
        for segment in self.in_flight.segments:
            parts = segment.adapter.part(self.gate_up), segment.adapter.part(self.down)
            if parts[0] is not None and parts[1] is not None:
                spans.append((segment.start, segment.end))
                often = (segment.end - segment.start) * chosen.shape[1] >= experts
                gate_up.append(Share(parts[0], often))
                down.append(Share(parts[1], often))
        routing = route(chosen, experts, spans, self._own)
        if not spans:
            return _Routes(routing, None, None)
        return _Routes(routing, Shares(routing, spans, gate_up), Shares(routing, spans, down))


@dataclass(frozen=True, slots=True)
class _Routes:
    """Where no adapter in flight has any of the layer's experts, there are no shares."""

    routing: Routing
    gate_up: Shares | None
    down: Shares | None


@dataclass(frozen=True, slots=True)
class _Saved:
    """Of a forward, what its backward wants: gate_up [pairs, outputs], and both weights' downs."""

    gate_up: Tensor
    gate_up_downs: Tensor | None
    downs: Tensor | None


def _forward(experts: RoutedExperts, routes: _Routes, hidden: Tensor, counted: Tensor) -> tuple[Tensor, _Saved]:
    (to_gate_up, to_down), (gate_up_bias, down_bias) = experts.weights, experts.biases
    routing, gate_up_downs, downs = routes.routing, None, None
    experts.pause()
    rows = routing.gather(hidden)  # [pairs, hidden]
    gate_up = rows.new_empty(len(rows), to_gate_up.shape[1])
    products = linear_of_each(rows, to_gate_up, gate_up_bias, routing.counts, gate_up)
    if routes.gate_up is not None:
        gate_up_downs = add_gate_up(routes.gate_up, products, hidden, rows, gate_up)
    _finish(products)
    inner = experts.activate(gate_up)  # [pairs, inputs of down]
    experts.pause()
    output = torch.empty_like(rows)  # [pairs, hidden]
    products = linear_of_each(inner, to_down, down_bias, routing.counts, output)
    if routes.down is not None:
        downs = add_down(routes.down, products, inner, output)
    _finish(products)
    y = routing.sum(output, counted)
    if routes.down is not None and downs is not None:
        add_common_down(routes.down, downs, counted, y)
    return y, _Saved(gate_up, gate_up_downs, downs)


class _Mixture(torch.autograd.Function):
    """Saves hidden states, what goes into the activation, and LoRA's narrow products; the rest is computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, counted: Tensor, experts: RoutedExperts, routes: _Routes) -> Tensor:
        y, saved = _forward(experts, routes, hidden, counted)
        ctx.save_for_backward(hidden, counted)
        ctx.rest = experts, routes, saved
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, counted = ctx.saved_tensors
        (experts, routes, saved), ctx.rest = ctx.rest, None  # else it stays until all of the backward is over
        shares, downs, routing = routes.gate_up, saved.gate_up_downs, routes.routing
        d_gate_up, d_counted = _down_backward(experts, routes, saved, counted, dy)
        experts.pause()
        d_rows = hidden.new_empty(len(d_gate_up), hidden.shape[1])  # [pairs, hidden]
        products = linear_of_each(d_gate_up, experts.weights[0].mT, None, routing.counts, d_rows)
        if shares is None:
            _finish(products)
            return routing.sum(d_rows), d_counted, None, None
        d_downs = add_gate_up_backward(shares, products, hidden, downs, d_gate_up, d_rows)
        d_hidden = routing.sum(d_rows)
        add_common_gate_up_backward(shares, hidden, d_downs, d_hidden)
        return d_hidden, d_counted, None, None


def _finish(products: Iterable[int]) -> None:
    """Those after which nothing was to be added."""
    deque(products, maxlen=0)


def _down_backward(
    experts: RoutedExperts, routes: _Routes, saved: _Saved, counted: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """dy [tokens, hidden] -> the gradients of gate_up [pairs, outputs] and of `counted` [tokens, choices]."""
    routing, bias = routes.routing, experts.biases[1]
    of_pairs = counted.reshape(-1, 1)[routing.order].to(dy.dtype)  # [pairs, 1]
    gate_up = saved.gate_up.detach().requires_grad_()
    with torch.enable_grad():
        activated = experts.activate(gate_up)
    inner = activated.detach()
    experts.pause()
    d_output = routing.gather(dy)  # [pairs, hidden], of an output that counts once
    d_inner = torch.empty_like(inner)
    products = linear_of_each(d_output, experts.weights[1].mT, None, routing.counts, d_inner)
    if routes.down is not None and saved.downs is not None:
        add_down_backward(routes.down, products, inner, of_pairs, saved.downs, dy, d_output, d_inner)
    _finish(products)
    d_counted = torch.linalg.vecdot(inner.float(), d_inner.float())  # [pairs]
    if bias is not None:
        d_counted += torch.linalg.vecdot(bias[routing.experts].float(), d_output.float())
    (d_gate_up,) = torch.autograd.grad(activated, gate_up, d_inner.mul_(of_pairs))
    return d_gate_up, routing.of_choices(d_counted.to(counted.dtype))


def _experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    experts: RoutedExperts = module.lorry
    in_flight = experts.in_flight
    if torch.compiler.is_compiling():
        return operators.experts(hidden_states, top_k_index, top_k_weights, in_flight, experts.gate_up)
    if in_flight.linears is not None:
        return in_flight.linears.experts(experts.gate_up, hidden_states, top_k_index, top_k_weights)
    return experts.compute(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(PACKED, _experts_forward)
