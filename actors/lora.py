"""LoRA over a packed row: every adapter's contiguous segment through its own A and B, on one frozen base.

The backward is written by hand: it computes no gradient for the base and adds the adapters' in place. Knows no loss.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wire.errors import InvalidRequestError, UnsupportedModelError
from .adapters import Adapter, AdapterSpec, Group, Part, Target
from .base_model import BaseModel
from .in_flight import InFlight

_ATTENTION = frozenset(("self_attn", "attn", "attention", "self_attention"))
_MLP = frozenset(("mlp", "feed_forward", "ffn"))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens `start` to `end` go through `part`, whose product is multiplied by `scale`."""

    part: Part
    start: int
    end: int
    scale: float


class LoraLinear(nn.Module):
    """Takes the place of one `nn.Linear`, shares its weight and bias, and adds what the segments in flight ask for."""

    def __init__(self, linear: nn.Linear, index: int, in_flight: InFlight) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.index = index
        self.in_flight = in_flight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] with the packed row's tokens in its leading axes -> [..., outputs]."""
        if not self.in_flight.segments or not (stretches := self.stretches()):
            return F.linear(x, self.weight, self.bias)
        rows = x.view(-1, self.in_features)  # [tokens, inputs]
        if torch.is_grad_enabled():
            y = _SegmentLora.apply(rows, self.weight, self.bias, stretches)
        else:
            y, _ = _forward(rows, self.weight, self.bias, stretches)
        return y.view(*x.shape[:-1], self.out_features)

    def stretches(self) -> list[Stretch]:
        """The segments in flight whose adapter trains this module."""
        return [
            Stretch(part, segment.start, segment.end, segment.adapter.spec.scale)
            for segment in self.in_flight.segments
            if (part := segment.adapter.part(self.index)) is not None
        ]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, stretches: list[Stretch]) -> tuple[Tensor, list[Tensor]]:
    """x [tokens, inputs] -> [tokens, outputs], and x A.T of every stretch, [stretch, rank]."""
    y = F.linear(x, weight, bias)
    return y, [forward_stretch(s, x, y) for s in stretches]


def forward_stretch(s: Stretch, x: Tensor, y: Tensor) -> Tensor:
    """Adds one stretch's scale (x A.T) B to `y` [tokens, outputs] in place; returns x A.T [stretch, rank].

    x [tokens, inputs] is the whole packed row, as in `backward_stretch`.
    """
    down = torch.mm(x[s.start : s.end], s.part.a_t)  # [stretch, rank]
    y[s.start : s.end].addmm_(down, s.part.b, alpha=s.scale)
    return down


def backward_stretch(s: Stretch, x: Tensor, down: Tensor, dy: Tensor, dx: Tensor) -> None:
    """Adds one stretch's share to `dx` [tokens, inputs] and to its adapter's gradients, all in place.

    x [tokens, inputs], down = x A.T [stretch, rank], dy [tokens, outputs].
    """
    grad_a, grad_b = s.part.grad_a, s.part.grad_b
    assert grad_a is not None and grad_b is not None, "a sampler's adapter has no gradients"
    x, dy = x[s.start : s.end], dy[s.start : s.end]
    d_down = torch.mm(dy, s.part.b_t)  # [stretch, rank]
    if x.dtype == grad_a.dtype:
        grad_a.addmm_(d_down.T, x, alpha=s.scale)
        grad_b.addmm_(down.T, dy, alpha=s.scale)
    else:  # low-precision products, which sum in float32 inside, accumulated in float32
        grad_a.add_(torch.mm(d_down.T, x), alpha=s.scale)
        grad_b.add_(torch.mm(down.T, dy), alpha=s.scale)
    dx[s.start : s.end].addmm_(d_down, s.part.a, alpha=s.scale)


class _SegmentLora(torch.autograd.Function):
    """y = x W.T + bias, and per stretch y += scale (x A.T) B; saves x and x A.T alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stretches: list[Stretch]) -> Tensor:
        y, downs = _forward(x, weight, bias, stretches)
        ctx.save_for_backward(x, weight)
        ctx.stretches, ctx.downs = stretches, downs
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dx = torch.mm(dy, weight)  # [tokens, inputs]
        for s, down in zip(ctx.stretches, ctx.downs, strict=True):
            backward_stretch(s, x, down, dy, dx)
        return dx, None, None, None


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """What of a base model adapters may train. `modules` in model order; `head` is the output embedding."""

    modules: tuple[Target, ...]
    head: LoraLinear
    has_experts: bool
    dtype: torch.dtype
    all_names: frozenset[str]

    def select(self, spec: AdapterSpec) -> list[Target]:
        """The modules that an adapter of `spec` trains. Raises InvalidRequestError where the model has none such."""
        if spec.train_mlp and self.has_experts:
            raise InvalidRequestError.of(
                "train_mlp", True, "train_mlp=False: this base model's MLPs are mixtures of experts, which stay frozen"
            )
        present: set[Group] = {target.group for target in self.modules}
        for group in sorted(spec.groups - present):
            raise InvalidRequestError.of(
                f"train_{group}", True, f"train_{group}=False: the base model has no such layer"
            )
        return [target for target in self.modules if target.group in spec.groups]

    def new_adapter(self, spec: AdapterSpec, device: torch.device | str, *, trainable: bool = True) -> Adapter:
        """A fresh adapter on the modules that `spec` selects; raises as `select` does."""
        return Adapter(spec, self.select(spec), dtype=self.dtype, device=device, trainable=trainable)

    def peft_names(self, targets: tuple[Target, ...]) -> list[str]:
        """PEFT's `target_modules` for these: leaf names where they match exactly these modules, else full names."""
        chosen = {target.name for target in targets}
        leaves = {name.rpartition(".")[2] for name in chosen}
        matched = {name for name in self.all_names if name.rpartition(".")[2] in leaves}
        return sorted(leaves if matched == chosen else chosen)


def attach_lora(base: BaseModel) -> LoraTargets:
    """Replaces the base's trainable linears by LoraLinear, in place.

    Raises UnsupportedModelError where its attention projections or output head are not `nn.Linear`.
    """
    model = base.model
    all_names = frozenset(name for name, _ in model.named_modules())
    has_experts = any("experts" in name.split(".") for name in all_names)
    head = model.get_output_embeddings()
    chosen: list[tuple[str, nn.Linear, Group]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            group = "unembed" if module is head else _group(name)
            if group is not None and not (group == "mlp" and has_experts):
                chosen.append((name, module, group))
    if not {"attn", "unembed"} <= {group for _, _, group in chosen}:
        raise UnsupportedModelError(f"{type(model).__name__} has no nn.Linear attention projections and output head")
    targets = [
        Target(index, name, linear.in_features, linear.out_features, group)
        for index, (name, linear, group) in enumerate(chosen)
    ]
    for index, (name, linear, _) in enumerate(chosen):
        model.set_submodule(name, LoraLinear(linear, index, base.in_flight))
    wrapped_head = model.get_output_embeddings()
    assert isinstance(wrapped_head, LoraLinear)
    return LoraTargets(tuple(targets), wrapped_head, has_experts, base.dtype, all_names)


def _group(name: str) -> Group | None:
    """By the module's path: layers.3.self_attn.q_proj is attention, layers.3.mlp.up_proj is MLP."""
    path = set(name.split(".")[:-1])
    if path & _ATTENTION:
        return "attn"
    return "mlp" if path & _MLP else None
