"""One LoRA adapter: its weights, gradient and Adam moments, each ONE flat vector with a view for every module.

Flat vectors make stepping, clipping, swapping and saving a few operations each. Knows no model and runs no layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ...wire.types import ExpertLora

Group: TypeAlias = Literal["attn", "mlp", "unembed"]
Factor: TypeAlias = Literal["a", "b"]
Axis: TypeAlias = Literal["inputs", "outputs", "experts"]


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """Of a layer's `count` routed experts, either what gate and up read or what down writes.

    `common` is the factor that an adapter whose expert LoRA is `shared` has once for them all: A of what they read,
    which is one hidden state, and B of what they write, whose sum is one again. `interleaved`: gate and up alternate in
    the base's weight, which `transposed` has [inputs, outputs]. `as_modules`: PEFT has a layer for each expert in this
    family's files, not one weight for all.
    """

    count: int
    common: Factor
    interleaved: bool = False
    as_modules: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """Of a layer that several devices share, what one of them has: from `start` to `end` along `axis`."""

    axis: Axis
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer of the base model that adapters may train, or one weight of a layer's routed experts; `index` is
    its place in model order. The sizes are the whole layer's, also where this process, one of `ranks`, has a `shard`
    of it."""

    index: int
    name: str
    inputs: int
    outputs: int
    group: Group
    expert_weight: ExpertWeight | None = None
    shard: Shard | None = None
    ranks: int = 1

    @property
    def most_outputs(self) -> int:
        """Of the layer's outputs, as many as the device with most of them has."""
        if self.shard is None or self.shard.axis != "outputs":
            return self.outputs
        return max(-(-self.outputs // self.ranks), self.shard.end - self.shard.start)

    @property
    def own_sizes(self) -> tuple[int, int]:
        """Inputs and outputs that this process computes with."""
        size = {"inputs": self.inputs, "outputs": self.outputs}
        if self.shard is not None and self.shard.axis != "experts":
            size[self.shard.axis] = self.shard.end - self.shard.start
        return size["inputs"], size["outputs"]

    @property
    def experts(self) -> int | None:
        return None if self.expert_weight is None else self.expert_weight.count


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What an adapter is before it learns anything. Scale alpha / rank, alpha 32: 'LoRA Without Regret'."""

    rank: int
    alpha: float = 32.0
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    expert_lora: ExpertLora = "shared"
    target_modules: tuple[str, ...] | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def groups(self) -> frozenset[Group]:
        chosen: dict[Group, bool] = {"attn": self.train_attn, "mlp": self.train_mlp, "unembed": self.train_unembed}
        return frozenset(group for group, train in chosen.items() if train)

    def takes(self, name: str) -> bool:
        """Whether it trains a layer of that name, if it trains its group. Names match as PEFT matches them."""
        return self.target_modules is None or any(is_called(name, end) for end in self.target_modules)


@dataclass(frozen=True, slots=True)
class Part:
    """One module's views into the flat vectors. `a` and `b` are in the base's dtype, the gradients in float32.

    B is kept transposed, so that every product of a segment reads it row by row. Samplers have no gradients. Of routed
    experts each has one dimension more in front: as many as there are experts, or one for them all.
    """

    scale: float
    a: Tensor  # [rank, inputs]
    b: Tensor  # [rank, outputs]
    a_t: Tensor  # [inputs, rank]
    b_t: Tensor  # [outputs, rank]
    grad_a: Tensor | None
    grad_b: Tensor | None


def accumulate(grad: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """grad [rank, n] += scale left.T right, of left [rows, rank] and right [rows, n].

    Low-precision products sum in float32 inside, and are accumulated in float32.
    """
    if left.dtype == grad.dtype:
        grad.addmm_(left.t(), right, alpha=scale)
    else:
        grad.add_(torch.mm(left.t(), right), alpha=scale)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that an adapter has learnt: [P] float32 each, and how many steps it took. Moments that are None are zero; no
    `grad`, none is pending."""

    weights: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    grad: Tensor | None
    step: int


class Adapter:
    """An adapter of `spec.rank` on `targets`, created as PEFT does it: A kaiming-uniform, B zero. Or of `weights`, [P]
    float32, which it does not copy.

    weights, grad, exp_avg, exp_avg_sq: [P] float32. compute: [P] in `dtype`, the same memory as `weights` where that
    is float32. nbytes: of all these. pending: whether gradients were accumulated since the last step. A sampler's
    adapter (`trainable=False`) has `weights` and `compute` alone.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        targets: Sequence[Target],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trainable: bool = True,
        weights: Tensor | None = None,
    ) -> None:
        self.spec = spec
        self.targets = tuple(targets)
        self.dtype = dtype
        self.trainable = trainable
        self.step = 0
        self.pending = False
        self._marked: tuple[bool, Tensor | None] | None = None
        self.weights = _initial_weights(spec, self.targets) if weights is None else weights  # [P]
        moments = [torch.zeros_like(self.weights) if trainable else torch.empty(0) for _ in range(3)]
        self.grad, self.exp_avg, self.exp_avg_sq = moments  # [P] each
        self._parts: list[Part | None] | None = None
        self.compute = self.weights
        self.to(device)
        copy = self.compute.nbytes if self.compute is not self.weights else 0
        self.nbytes = self.weights.nbytes + sum(moment.nbytes for moment in moments) + copy

    @property
    def size(self) -> int:
        """P: how many parameters it has."""
        return self.weights.numel()

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def to(self, device: torch.device | str) -> None:
        """Moves all vectors, or none where memory runs out; views taken before are stale if the device changes."""
        marked = self._marked
        if marked is not None and marked[1] is not None:
            marked = marked[0], marked[1].to(device)
        weights, grad = self.weights.to(device), self.grad.to(device)
        exp_avg, exp_avg_sq = self.exp_avg.to(device), self.exp_avg_sq.to(device)
        self.compute = weights.to(self.dtype)
        self.weights, self.grad, self.exp_avg, self.exp_avg_sq = weights, grad, exp_avg, exp_avg_sq
        self._marked = marked
        self._parts = None

    def part(self, index: int) -> Part | None:
        """What it adds to the target of that index; None where it leaves the module alone."""
        if self._parts is None:  # of many adapters few are in use, and views of every module take memory, too
            self._parts = self._views_of_modules()
        return self._parts[index] if index < len(self._parts) else None

    def refresh(self) -> None:
        """Brings `compute` up to date after `weights` changed in place."""
        if self.compute is not self.weights:
            self.compute.copy_(self.weights)

    def discard(self) -> None:
        """The pending gradient is dropped."""
        self.grad.zero_()
        self.pending = False

    def state(self, *, copied: bool) -> TrainingState:
        """What it has learnt, on the host; `copied`, later steps do not change it."""
        weights, exp_avg, exp_avg_sq, grad = (
            vector.detach().to("cpu", copy=copied)
            for vector in (self.weights, self.exp_avg, self.exp_avg_sq, self.grad if self.pending else torch.empty(0))
        )
        return TrainingState(weights, exp_avg, exp_avg_sq, grad if self.pending else None, self.step)

    def set_state(self, state: TrainingState) -> None:
        """Becomes what `state` was taken of."""
        self.weights.copy_(state.weights)
        pairs = ((self.exp_avg, state.exp_avg), (self.exp_avg_sq, state.exp_avg_sq), (self.grad, state.grad))
        for vector, saved in pairs:
            vector.zero_() if saved is None else vector.copy_(saved)
        self.step, self.pending = state.step, state.grad is not None
        self.refresh()

    def mark(self) -> None:
        """Remembers the pending gradient until `commit` or `rollback`; nothing is copied where none is pending."""
        self._marked = self.pending, self.grad.clone() if self.pending else None

    def rollback(self) -> None:
        """Puts the gradient back to what it was at `mark`; does nothing where none was marked."""
        if self._marked is None:
            return
        self.pending, saved = self._marked
        if saved is None:
            self.grad.zero_()
        else:
            self.grad.copy_(saved)
        self._marked = None

    def commit(self) -> None:
        self._marked = None

    def module_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each module's master weights, as views: A [rank, inputs] and B transposed [rank, outputs], float32; of routed
        experts with one dimension more in front, of `experts` or 1."""
        return {target.name: pair for target, pair in zip(self.targets, self.views(self.weights), strict=True)}

    def module_grads(self) -> dict[str, tuple[Tensor, Tensor]]:
        """As `module_weights`, for the gradient."""
        return {target.name: pair for target, pair in zip(self.targets, self.views(self.grad), strict=True)}

    def views(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        shapes = [shape for target in self.targets for shape in shapes_of(self.spec, target)]
        pieces = [piece.view(shape) for piece, shape in zip(flat.split([*map(math.prod, shapes)]), shapes, strict=True)]
        return list(zip(pieces[::2], pieces[1::2], strict=True))

    def _views_of_modules(self) -> list[Part | None]:
        grads = self.views(self.grad) if self.trainable else [(None, None)] * len(self.targets)
        parts: list[Part | None] = [None] * (1 + max(target.index for target in self.targets))
        for target, weights, of_weights in zip(self.targets, self.views(self.compute), grads, strict=True):
            a, b = _own(target.shard, *weights)
            grad_a, grad_b = _own(target.shard, *of_weights)
            assert a is not None and b is not None
            parts[target.index] = Part(self.spec.scale, a, b, a.mT, b.mT, grad_a, grad_b)
        return parts


def _own(shard: Shard | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of a layer's factors, A [..., rank, inputs] and B [..., rank, outputs], what works on the shard of it."""
    if shard is None or a is None or b is None:
        return a, b
    start, size = shard.start, shard.end - shard.start
    if shard.axis == "inputs":
        return a.narrow(-1, start, size), b
    if shard.axis == "outputs":
        return a, b.narrow(-1, start, size)
    # A factor that all experts share is every rank's.
    return (a if len(a) == 1 else a.narrow(0, start, size)), (b if len(b) == 1 else b.narrow(0, start, size))


def is_called(name: str, end: str) -> bool:
    """Whether a layer's whole name, or what is behind one of its dots, is `end`."""
    return name == end or name.endswith(f".{end}")


def shapes_of(spec: AdapterSpec, target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A and of B transposed."""
    a, b = (spec.rank, target.inputs), (spec.rank, target.outputs)
    if target.expert_weight is None:
        return a, b
    count, common = target.expert_weight.count, target.expert_weight.common if spec.expert_lora == "shared" else None
    return (1 if common == "a" else count, *a), (1 if common == "b" else count, *b)


def _initial_weights(spec: AdapterSpec, targets: Sequence[Target]) -> Tensor:
    """A from U(-1/sqrt(inputs), 1/sqrt(inputs)), which is kaiming_uniform(a=sqrt(5)); B zero."""
    generator = torch.Generator().manual_seed(spec.seed)
    sizes = [math.prod(shape) for target in targets for shape in shapes_of(spec, target)]
    weights = torch.zeros(sum(sizes))
    for target, piece in zip(targets, weights.split(sizes)[::2], strict=True):
        bound = 1 / math.sqrt(target.inputs)
        piece.uniform_(-bound, bound, generator=generator)
    return weights
