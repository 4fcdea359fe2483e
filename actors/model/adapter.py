"""One LoRA adapter: its weights, gradient and Adam moments, each ONE flat vector with a view for every module.

Flat vectors make stepping, clipping, swapping and saving a few operations each. Knows no model and runs no layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .spec import AdapterSpec, Shard, Target, shapes_of


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


class Away(Protocol):
    """Where an adapter is that several devices have parts of. What it tells is whole, on the host."""

    @property
    def device(self) -> torch.device: ...

    def part(self, index: int) -> Part | None:
        """This process's, of one module."""
        ...

    def weights(self) -> Tensor: ...

    def state(self, *, pending: bool) -> TrainingState:
        """But for the count of steps."""
        ...

    def marked(self) -> Tensor:
        """The gradient as it was at `mark`."""
        ...

    def mark(self) -> None:
        """This, `rollback`, `commit` and `discard` are as the adapter's own."""
        ...

    def rollback(self) -> None: ...

    def commit(self) -> None: ...

    def discard(self) -> None: ...


class Adapter:
    """An adapter of `spec.rank` on `targets`, created as PEFT does it: A kaiming-uniform, B zero. Or of `weights`, [P]
    float32, which it does not copy.

    weights, grad, exp_avg, exp_avg_sq: [P] float32. compute: [P] in `dtype`, the same memory as `weights` where that
    is float32. nbytes: of all these. pending: whether gradients were accumulated since the last step. A sampler's
    adapter (`trainable=False`) has `weights` and `compute` alone.

    Where several devices share the base model, an adapter in use is away: they have parts of it. It comes home, whole,
    when somebody reads or changes a vector of it.
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
        self._away: Away | None = None
        self._is_marked_away = False
        weights = _initial_weights(spec, self.targets) if weights is None else weights  # [P]
        moments = [torch.zeros_like(weights) if trainable else torch.empty(0) for _ in range(3)]
        self._vectors = _Vectors(weights, *moments, compute=weights)
        self._parts: list[Part | None] | None = None
        self._elements = weights.numel()
        self.to(device)
        copy = self.compute.nbytes if self.compute is not self.weights else 0
        self.nbytes = weights.nbytes + sum(moment.nbytes for moment in moments) + copy

    @property
    def size(self) -> int:
        """P: how many parameters it has."""
        return self._elements

    @property
    def device(self) -> torch.device:
        """Of one that is away: the first of those that have it."""
        return self._vectors.weights.device if self._away is None else self._away.device

    @property
    def away(self) -> Away | None:
        return self._away

    @property
    def weights(self) -> Tensor:
        return self._home().weights

    @property
    def grad(self) -> Tensor:
        return self._home().grad

    @property
    def exp_avg(self) -> Tensor:
        return self._home().exp_avg

    @property
    def exp_avg_sq(self) -> Tensor:
        return self._home().exp_avg_sq

    @property
    def compute(self) -> Tensor:
        return self._home().compute

    def leave(self, away: Away) -> None:
        """Others have all of its vectors now."""
        self._away, self._vectors = away, self._vectors.emptied()
        self._parts = None

    def _home(self) -> "_Vectors":
        if self._away is not None:
            state = self._away.state(pending=self.pending)
            found = (state.grad, state.exp_avg, state.exp_avg_sq)
            vectors = _Vectors(
                state.weights,
                *(vector if vector is not None else self._zeros(state.weights) for vector in found),
                compute=state.weights.to(self.dtype),
            )
            marked = self._marked
            if self._is_marked_away and marked is not None and marked[0]:
                marked = True, self._away.marked()
            # All of it is here: where memory ran out above, it still is where it was.
            self._vectors, self._marked, self._away, self._is_marked_away = vectors, marked, None, False
        return self._vectors

    def _zeros(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if self.trainable else torch.empty(0)

    def to(self, device: torch.device | str) -> None:
        """Moves all vectors, or none where memory runs out; views taken before are stale if the device changes."""
        vectors, marked = self._home(), self._marked
        if marked is not None and marked[1] is not None:
            marked = marked[0], marked[1].to(device)
        self._vectors = vectors.to(device, self.dtype)
        self._marked = marked
        self._parts = None

    def part(self, index: int) -> Part | None:
        """What it adds to the target of that index; None where it leaves the module alone."""
        if self._away is not None:
            return self._away.part(index)
        if self._parts is None:  # of many adapters few are in use, and views of every module take memory, too
            self._parts = self._views_of_modules()
        return self._parts[index] if index < len(self._parts) else None

    def refresh(self) -> None:
        """Brings `compute` up to date after `weights` changed in place."""
        if self.compute is not self.weights:
            self.compute.copy_(self.weights)

    def discard(self) -> None:
        """The pending gradient is dropped."""
        if self._away is not None:
            self._away.discard()
        else:
            self.grad.zero_()
        self.pending = False

    def state(self, *, copied: bool) -> TrainingState:
        """What it has learnt, on the host; `copied`, later steps do not change it."""
        if self._away is not None:
            return replace(self._away.state(pending=self.pending), step=self.step)
        weights, exp_avg, exp_avg_sq, grad = (
            vector.detach().to("cpu", copy=copied)
            for vector in (self.weights, self.exp_avg, self.exp_avg_sq, self.grad if self.pending else torch.empty(0))
        )
        return TrainingState(weights, exp_avg, exp_avg_sq, grad if self.pending else None, self.step)

    def weights_copy(self) -> Tensor:
        """[P] on the host, which later steps do not change."""
        return self._away.weights() if self._away is not None else self.weights.detach().to("cpu", copy=True)

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
        if self._away is not None:
            self._away.mark()
            self._marked, self._is_marked_away = (self.pending, None), True
        else:
            self._marked = self.pending, self.grad.clone() if self.pending else None

    def rollback(self) -> None:
        """Puts the gradient back to what it was at `mark`; does nothing where none was marked."""
        if self._marked is None:
            return
        if self._away is not None and self._is_marked_away:
            self._away.rollback()
            self.pending = self._marked[0]
        else:
            grad = self.grad  # which may have to come home
            self.pending, saved = self._marked
            grad.zero_() if saved is None else grad.copy_(saved)
        self._marked, self._is_marked_away = None, False

    def commit(self) -> None:
        if self._away is not None and self._is_marked_away:
            self._away.commit()
        self._marked, self._is_marked_away = None, False

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


@dataclass(frozen=True, slots=True)
class _Vectors:
    """[P] each, or of a sampler's adapter empty but for `weights` and `compute`."""

    weights: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    compute: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "_Vectors":
        weights, *rest = (v.to(device) for v in (self.weights, self.grad, self.exp_avg, self.exp_avg_sq))
        return _Vectors(weights, *rest, compute=weights.to(dtype))

    def emptied(self) -> "_Vectors":
        return _Vectors(
            *(v.new_empty(0) for v in (self.weights, self.grad, self.exp_avg, self.exp_avg_sq, self.compute))
        )


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


def _initial_weights(spec: AdapterSpec, targets: Sequence[Target]) -> Tensor:
    """A from U(-1/sqrt(inputs), 1/sqrt(inputs)), which is kaiming_uniform(a=sqrt(5)); B zero."""
    generator = torch.Generator().manual_seed(spec.seed)
    sizes = [math.prod(shape) for target in targets for shape in shapes_of(spec, target)]
    weights = torch.zeros(sum(sizes))
    for target, piece in zip(targets, weights.split(sizes)[::2], strict=True):
        bound = 1 / math.sqrt(target.inputs)
        piece.uniform_(-bound, bound, generator=generator)
    return weights
