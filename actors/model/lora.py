"""LoRA over a packed row: every adapter's contiguous segment through its own A and B, on one frozen base.

The backward is written by hand: it computes no gradient for the base and adds the adapters' in place. Knows no loss.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ...wire.errors import InvalidRequestError, UnsupportedModelError
from ...wire.types import FileLayout
from . import operators
from .adapter import Adapter, Part, accumulate
from .agreement import agree
from .base_model import BaseModel
from .experts import PACKED as ROUTED
from .experts import RoutedExperts
from .in_flight import InFlight
from .nf4 import is_quantised, weight_of
from .probe import AttentionProbe
from .products import linear, linear_backward
from .spec import AdapterSpec, Group, Target, is_called
from .targets import find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Layout:
    """How a packed row divides for one module: `sizes[i]` tokens go through `parts[i]`, or None, the bare base."""

    sizes: list[int]
    parts: list[Part | None]

    def clip(self, start: int, end: int) -> "Layout":
        """The same of tokens `start` to `end` alone."""
        clipped = Layout([], [])
        first = 0
        for size, part in zip(self.sizes, self.parts, strict=True):
            last = first + size
            if first < end and last > start:
                clipped.sizes.append(min(last, end) - max(first, start))
                clipped.parts.append(part)
            first = last
        return clipped


class LoraLinear(nn.Module):
    """Takes the place of one `nn.Linear`, shares its weight and bias, and adds what the segments in flight ask for."""

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, index: int, in_flight: InFlight) -> None:
        super().__init__()
        self.base, self.bias = linear, linear.bias
        self.is_quantised = is_quantised(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.index = index
        self.in_flight = in_flight

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs], the base's own; where that is quantised, expanded each time."""
        return weight_of(self.base) if self.is_quantised else self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] with the packed row's tokens in its leading axes -> [..., outputs]."""
        if torch.compiler.is_compiling():
            return operators.linear(x, self.in_flight, self.index, self.out_features)
        if self.in_flight.linears is not None:
            return self.in_flight.linears.linear(self.index, x)
        self.in_flight.pause()
        rows = x.view(-1, self.in_features)  # [tokens, inputs]
        layout = self.layout(len(rows))
        if torch.is_grad_enabled():
            y = _SegmentLora.apply(rows, self, layout)
        else:
            y, _ = self.apply_to(rows, layout)
        return y.view(*x.shape[:-1], self.out_features)

    def apply_to(self, rows: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor | None]]:
        """rows [tokens, inputs] -> [tokens, outputs], and what `add_lora` returns. No autograd."""
        y = linear(rows, self.weight, self.bias)
        return y, add_lora(layout, rows, y)

    def backward_of(self, dy: Tensor, rows: Tensor | None, layout: Layout, downs: list[Tensor | None]) -> Tensor:
        """Of `apply_to`: dy [tokens, outputs] -> the gradient of rows, of which None is needed where nobody trains it.
        Adds the adapters' gradients in place."""
        dx = linear_backward(dy, self.weight)  # [tokens, inputs]
        if rows is not None:
            add_lora_backward(layout, rows, downs, dy, dx)
        return dx

    def layout(self, tokens: int) -> Layout:
        """How the segments in flight divide a row of `tokens`."""
        layout, end = Layout([], []), 0
        for segment in self.in_flight.segments:
            part = segment.adapter.part(self.index)
            if part is None:
                continue
            if segment.start > end:
                layout.sizes.append(segment.start - end)
                layout.parts.append(None)
            layout.sizes.append(segment.end - segment.start)
            layout.parts.append(part)
            end = segment.end
        if end < tokens:
            layout.sizes.append(tokens - end)
            layout.parts.append(None)
        return layout


def add_lora(layout: Layout, x: Tensor, y: Tensor) -> list[Tensor | None]:
    """Adds scale (x A.T) B to `y` [tokens, outputs] in place, each stretch with its own A and B.

    x [tokens, inputs]; `y` may be float32 where x is not. Returns every stretch's x A.T [stretch, rank], which the
    backward wants.
    """
    downs: list[Tensor | None] = []
    pieces = zip(layout.parts, x.split_with_sizes(layout.sizes), y.split_with_sizes(layout.sizes), strict=True)
    for part, x_piece, y_piece in pieces:
        if part is None:
            downs.append(None)
            continue
        down = torch.mm(x_piece, part.a_t)  # [stretch, rank]
        y_piece.addmm_(down.to(y.dtype), part.b.to(y.dtype), alpha=part.scale)
        downs.append(down)
    return downs


def add_lora_backward(layout: Layout, x: Tensor, downs: list[Tensor | None], dy: Tensor, dx: Tensor) -> None:
    """Adds LoRA's share to `dx` [tokens, inputs] and to the adapters' gradients, all in place.

    x [tokens, inputs], downs as `add_lora` returned them, dy [tokens, outputs].
    """
    split = (tensor.split_with_sizes(layout.sizes) for tensor in (x, dy, dx))
    for part, down, x_piece, dy_piece, dx_piece in zip(layout.parts, downs, *split, strict=True):
        if part is None or down is None:
            continue
        grad_a, grad_b = part.grad_a, part.grad_b
        assert grad_a is not None and grad_b is not None, "a sampler's adapter has no gradients"
        d_down = torch.mm(dy_piece, part.b_t)  # [stretch, rank]
        accumulate(grad_a, d_down, x_piece, part.scale)
        accumulate(grad_b, down, dy_piece, part.scale)
        dx_piece.addmm_(d_down, part.a, alpha=part.scale)


class _SegmentLora(torch.autograd.Function):
    """y = x W.T + bias, and per stretch y += scale (x A.T) B; saves x and x A.T, and neither where nobody trains it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LoraLinear, layout: Layout) -> Tensor:
        y, ctx.downs = layer.apply_to(x, layout)
        trained = any(part is not None for part in layout.parts)
        ctx.save_for_backward(x if trained else None)
        ctx.layer, ctx.layout = layer, layout
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layer.in_flight.pause()
        (x,) = ctx.saved_tensors
        downs, ctx.downs = ctx.downs, None  # else they stay until all of the backward is over
        return ctx.layer.backward_of(dy, x, ctx.layout, downs), None, None


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """What of a base model adapters may train, `modules` in model order.

    `frozen_experts` names a class of routed experts that adapters cannot train, and so no MLP of the model's. `layout`
    is what their files are written in."""

    modules: tuple[Target, ...]
    frozen_experts: str | None
    layout: FileLayout
    dtype: torch.dtype
    all_names: frozenset[str]

    @classmethod
    def of(cls, model: "PreTrainedModel", layout: FileLayout = "peft", dtype: torch.dtype | None = None) -> Self:
        """Of one that may be without weights. Raises UnsupportedModelError as `find_sites` does."""
        sites = find_sites(model)
        all_names = frozenset(name for name, _ in model.named_modules())
        return cls(sites.targets, sites.frozen_experts, layout, dtype or model.dtype, all_names)

    def select(self, spec: AdapterSpec) -> list[Target]:
        """The modules that an adapter of `spec` trains. Raises InvalidRequestError where the model has none such."""
        if spec.train_mlp and self.frozen_experts:
            expected = f"train_mlp=False: this base model's MLPs are {self.frozen_experts}, which stay frozen"
            raise InvalidRequestError.of("train_mlp", True, expected)
        present: set[Group] = {target.group for target in self.modules}
        for group in sorted(spec.groups - present):
            raise InvalidRequestError.of(
                f"train_{group}", True, f"train_{group}=False: the base model has no such layer"
            )
        chosen = [target for target in self.modules if target.group in spec.groups]
        for end in spec.target_modules or ():
            if not any(is_called(target.name, end) for target in chosen):
                raise InvalidRequestError.of("target_modules", end, "layers of this base model, of what is trained")
        return [target for target in chosen if spec.takes(target.name)]

    def names_of(self, chosen: Collection[Target]) -> tuple[str, ...] | None:
        """`target_modules` for these; None where they are all of their groups."""
        groups, names = {target.group for target in chosen}, {target.name for target in chosen}
        if names == {target.name for target in self.modules if target.group in groups}:
            return None
        leaf_of = {target.name: target.name.rpartition(".")[2] for target in self.modules if target.group in groups}
        partly = {leaf for name, leaf in leaf_of.items() if name not in names}
        return tuple(sorted({name if leaf_of[name] in partly else leaf_of[name] for name in names}))

    def new_adapter(self, spec: AdapterSpec, device: torch.device | str, *, trainable: bool = True) -> Adapter:
        """A fresh adapter on the modules that `spec` selects; raises as `select` does."""
        return Adapter(spec, self.select(spec), dtype=self.dtype, device=device, trainable=trainable)

    def peft_names(self, targets: tuple[Target, ...]) -> tuple[list[str], list[str]]:
        """PEFT's `target_modules` and `target_parameters` for these: of modules leaf names where they match exactly
        these, else full names.

        Where experts are modules to PEFT, it takes names that end as theirs for the experts' alone. So a dense layer of
        such a name is given as a parameter, too.
        """
        mixture = [target for target in targets if target.experts]
        modules = any(target.expert_weight and target.expert_weight.as_modules for target in mixture)
        dense = [target for target in targets if not target.experts]
        chosen = {target.name for target in dense}
        leaves = {name.rpartition(".")[2] for name in chosen}
        matched = {name for name in self.all_names if name.rpartition(".")[2] in leaves}
        names = leaves if matched == chosen else chosen
        if not mixture:
            return sorted(names), []
        if not modules:
            return sorted(names), sorted({".".join(target.name.split(".")[-3:]) for target in mixture})
        beside = sorted(f"{target.name}.weight" for target in dense if target.group == "mlp")
        return sorted(leaves | {"gate_proj", "up_proj", "down_proj"}), beside


def attach_lora(base: BaseModel, layout: FileLayout = "peft") -> LoraTargets:
    """Replaces the base's trainable linears by LoraLinear, in place, and lets its routed experts call ours.

    Raises UnsupportedModelError where its attention projections or output head are not `nn.Linear`.
    """
    model, targets = base.model, LoraTargets.of(base.model, layout, base.dtype)
    for site in find_sites(model).each:
        target = site.targets[0]
        if isinstance(site.module, nn.Linear):
            model.set_submodule(target.name, LoraLinear(site.module, target.index, base.in_flight))
        else:
            gate_up, down = site.targets
            experts = RoutedExperts(site.module, gate_up.index, down.index, base.in_flight)
            site.module.lorry = experts  # pyright: ignore[reportArgumentType]
    if experts_of(base):
        _take_over_experts(base)
    return targets


def _take_over_experts(base: BaseModel) -> None:
    """On the meta device nothing is computed that could be compared."""
    has_weights = base.device.type != "meta"
    expected = logits_of_some(base, 2) if has_weights else None
    # As set_experts_implementation does, which older ones have for theirs alone.
    for experts in experts_of(base).values():
        experts.module.config._experts_implementation = ROUTED
    if expected is not None and not agree(logits_of_some(base, 2), expected):
        raise UnsupportedModelError(f"{type(base.model).__name__} has experts that compute something else here")


@torch.no_grad()
def logits_of_some(base: BaseModel, count: int) -> Tensor:
    """Of so many tokens, [count, vocab], without adapters."""
    tokens = torch.arange(count, device=base.device) % base.vocab_size
    base.in_flight.cache = AttentionProbe()
    try:
        return base.logits(base.hidden_states(tokens, tokens, grad=False))
    finally:
        base.in_flight.cache = None


def experts_of(base: BaseModel) -> dict[int, RoutedExperts]:
    """The routed experts that adapters may train, by the index of their first weight."""
    found = (getattr(module, "lorry", None) for module in base.model.modules())
    return {experts.gate_up: experts for experts in found if isinstance(experts, RoutedExperts)}


def quantise_experts(base: BaseModel) -> None:
    """Their weights are in 4 bits from now on, as those of the layers around them are."""
    for experts in experts_of(base).values():
        experts.quantise()


def head_of(base: BaseModel) -> LoraLinear:
    """The output head, after `attach_lora`."""
    head = base.model.get_output_embeddings()
    assert isinstance(head, LoraLinear)
    return head


def layers_of(base: BaseModel) -> dict[int, LoraLinear]:
    """The layers that `attach_lora` put in, by index."""
    return {module.index: module for module in base.model.modules() if isinstance(module, LoraLinear)}
