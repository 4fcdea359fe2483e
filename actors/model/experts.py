"""The routed experts of a layer with LoRA: the one function that transformers calls in place of its own, for every
family whose experts are one module.

As in `lora`, the backward is written by hand: it computes no gradient for the base and adds the adapters' in place.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import operators
from .adapter import ExpertWeight, Target
from .expert_lora import (
    Shares,
    add_common_down,
    add_common_gate_up_backward,
    add_down,
    add_down_backward,
    add_gate_up,
    add_gate_up_backward,
)
from .in_flight import InFlight
from .products import linear_of_each
from .routing import Routing, route

PACKED = "lorry"


class RoutedExperts:
    """Of one layer: `module` has the base's weights, `gate_up` and `down` are their places in model order.

    `are_routed_experts` must hold of it.
    """

    def __init__(self, module: nn.Module, gate_up: int, down: int, in_flight: InFlight) -> None:
        self.module: Any = module
        self.gate_up, self.down, self.in_flight = gate_up, down, in_flight

    def targets(self, name: str, *, as_modules: bool) -> list[Target]:
        """Both weights, as adapters may train them."""
        interleaved = not self.module.is_concatenated
        (count, outputs, inputs), (_, down_outputs, down_inputs) = (weight.shape for weight in self.weights)
        of_gate_up, of_down = (ExpertWeight(count, common, interleaved, as_modules) for common in ("a", "b"))
        return [
            Target(self.gate_up, f"{name}.gate_up_proj", inputs, outputs, "mlp", of_gate_up),
            Target(self.down, f"{name}.down_proj", down_inputs, down_outputs, "mlp", of_down),
        ]

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """[experts, outputs, inputs] each, of gate and up together, and of down."""
        gate_up, down = self.module.gate_up_proj, self.module.down_proj
        return (gate_up.mT, down.mT) if self.module.is_transposed else (gate_up, down)

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """[experts, outputs] each."""
        return (self.module.gate_up_proj_bias, self.module.down_proj_bias) if self.module.has_bias else (None, None)

    def activate(self, gate_up: Tensor) -> Tensor:
        """[pairs, outputs of gate and up] -> [pairs, inputs of down]."""
        return self.module._apply_gate(gate_up)

    def compute(self, hidden: Tensor, chosen: Tensor, counted: Tensor) -> Tensor:
        """With the adapters in flight: hidden [tokens, hidden], chosen [tokens, choices] int64, and what each choice
        counts, [tokens, choices] -> [tokens, hidden]."""
        routes = self._routes(chosen)
        if torch.is_grad_enabled():
            return _Mixture.apply(hidden, counted, self, routes)
        return _forward(self, routes, hidden, counted)[0]

    def _routes(self, chosen: Tensor) -> "_Routes":
        """An adapter that trains experts trains both of their weights."""
        segments = [s for s in self.in_flight.segments if s.adapter.part(self.gate_up) is not None]
        spans = [(segment.start, segment.end) for segment in segments]
        routing = route(chosen, len(self.module.gate_up_proj), spans)
        gate_up, down = (
            Shares(routing, spans, [segment.adapter.part(index) for segment in segments])
            for index in (self.gate_up, self.down)
        )
        return _Routes(routing, gate_up, down)


def are_routed_experts(module: nn.Module) -> bool:
    """Whether transformers' interface computes them, and as those of Qwen3-MoE, GPT-OSS and DeepSeek-V3: two products
    with a gate between them, and nothing behind."""
    names = ("gate_up_proj", "down_proj", "is_transposed", "is_concatenated", "_apply_gate")
    known = all(hasattr(module, name) for name in names)
    return known and not getattr(module, "has_post_expert_norm", False)


@dataclass(frozen=True, slots=True)
class _Routes:
    routing: Routing
    gate_up: Shares
    down: Shares

    def of_pairs(self, counted: Tensor) -> Tensor:
        """[tokens, choices] -> [pairs, 1]."""
        return counted.reshape(-1, 1)[self.routing.order]


@dataclass(frozen=True, slots=True)
class _Saved:
    """Of a forward, what its backward wants: gate_up [pairs, outputs], and both weights' downs."""

    gate_up: Tensor
    gate_up_downs: Tensor | None
    downs: Tensor | None


def _forward(experts: RoutedExperts, routes: _Routes, hidden: Tensor, counted: Tensor) -> tuple[Tensor, _Saved]:
    (to_gate_up, to_down), (gate_up_bias, down_bias) = experts.weights, experts.biases
    routing, of_pairs = routes.routing, routes.of_pairs(counted)
    experts.in_flight.pause()
    rows = hidden[routing.tokens]  # [pairs, hidden]
    gate_up = linear_of_each(rows, to_gate_up, gate_up_bias, routing.counts)
    gate_up_downs = add_gate_up(routes.gate_up, hidden, rows, gate_up)
    inner = experts.activate(gate_up)  # [pairs, inputs of down]
    experts.in_flight.pause()
    output = linear_of_each(inner, to_down, down_bias, routing.counts)  # [pairs, hidden]
    downs = add_down(routes.down, inner, output)
    y = routing.sum(output * of_pairs).to(hidden.dtype)
    add_common_down(routes.down, downs, of_pairs, y)
    return y, _Saved(gate_up, gate_up_downs, downs)


class _Mixture(torch.autograd.Function):
    """Saves hidden states, what goes into the activation, and LoRA's narrow products; the rest is computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, counted: Tensor, experts: RoutedExperts, routes: _Routes) -> Tensor:
        y, saved = _forward(experts, routes, hidden, counted)
        ctx.save_for_backward(hidden, counted, saved.gate_up)
        ctx.rest = experts, routes, saved.gate_up_downs, saved.downs
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, counted, gate_up = ctx.saved_tensors
        experts, routes, gate_up_downs, downs = ctx.rest
        d_gate_up, d_counted = _down_backward(experts, routes, gate_up, counted, downs, dy)
        experts.in_flight.pause()
        d_rows = linear_of_each(d_gate_up, experts.weights[0].mT, None, routes.routing.counts)  # [pairs, hidden]
        d_downs = add_gate_up_backward(routes.gate_up, hidden, gate_up_downs, d_gate_up, d_rows)
        d_hidden = routes.routing.sum(d_rows)
        add_common_gate_up_backward(routes.gate_up, hidden, d_downs, d_hidden)
        return d_hidden, d_counted, None, None


def _down_backward(
    experts: RoutedExperts, routes: _Routes, gate_up: Tensor, counted: Tensor, downs: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """dy [tokens, hidden] -> the gradients of gate_up [pairs, outputs] and of `counted` [tokens, choices]."""
    routing, of_pairs, bias = routes.routing, routes.of_pairs(counted), experts.biases[1]
    gate_up = gate_up.detach().requires_grad_()
    with torch.enable_grad():
        activated = experts.activate(gate_up)
    inner = activated.detach()
    experts.in_flight.pause()
    d_output = dy[routing.tokens]  # [pairs, hidden], of an output that counts once
    d_inner = linear_of_each(d_output, experts.weights[1].mT, None, routing.counts)
    add_down_backward(routes.down, inner, of_pairs, downs, dy, d_output, d_inner)
    d_counted = (inner.float() * d_inner).sum(-1)  # [pairs]
    if bias is not None:
        d_counted += (bias[routing.experts].float() * d_output).sum(-1)
    (d_gate_up,) = torch.autograd.grad(activated, gate_up, (d_inner * of_pairs).to(inner.dtype))
    return d_gate_up, d_counted.to(counted.dtype)[routing.places]


def _experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    experts: RoutedExperts = module.lorry
    in_flight = experts.in_flight
    if torch.compiler.is_compiling():
        return operators.experts(hidden_states, top_k_index, top_k_weights, in_flight, experts.gate_up)
    if in_flight.linears is not None:
        return in_flight.linears.experts(experts.gate_up, hidden_states, top_k_index, top_k_weights)
    return experts.compute(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(PACKED, _experts_forward)
