"""Adam with decoupled weight decay for many runs at once, each with its own hyperparameters. Knows no model or run."""

# torch.optim itself is written in these foreach functions, and there are no public ones.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...wire.types import AdamParams
from ..model.adapter import Adapter

_ELEMENTS_AT_ONCE = 1 << 25
"""Adapters are stepped together up to this many elements (128 MiB for each of three temporaries); beyond it they gain
nothing from company."""


class Across(Protocol):
    """The other devices that have parts of the adapters."""

    def gradients(self, adapters: Sequence[Adapter]) -> tuple[list[Tensor], list[float]]:
        """Of this device's parts, what all devices together accumulated, in copies; and the norms of the whole."""
        ...

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Whether all devices say so, of each adapter."""
        ...


def adam_step(
    adapters: Sequence[Adapter], params: Sequence[AdamParams], across: Across | None = None
) -> Iterator[float | None]:
    """One step of torch.optim.AdamW's rule for each adapter, or for this device's part of each; yields the gradients'
    norms before clipping.

    The gradient is zeroed and no longer pending. None for an adapter whose gradient or new state would not be finite:
    its weights, moments and step count stay as they were. Adapters must be distinct and have a pending gradient.

    It steps as it is read: where memory runs out, those whose norm came have stepped, and no others.
    """
    for chosen in groups(adapters):
        yield from _step_together(adapters[chosen], params[chosen], across)


def groups(adapters: Sequence[Adapter]) -> Iterator[slice]:
    start = elements = 0
    for i, adapter in enumerate(adapters):
        if i > start and elements + adapter.size > _ELEMENTS_AT_ONCE:
            yield slice(start, i)
            start, elements = i, 0
        elements += adapter.size
    yield slice(start, len(adapters))


def _step_together(
    adapters: Sequence[Adapter], params: Sequence[AdamParams], across: Across | None
) -> list[float | None]:
    """Where memory runs out, on any device, nothing has changed."""
    grads = [adapter.grad for adapter in adapters]
    grads, norms = (grads, _norms(grads)) if across is None else across.gradients(adapters)
    updates = _updates(adapters, params, grads, norms)
    finite = [all(checks) for checks in zip(map(math.isfinite, norms), *map(all_finite, updates), strict=True)]
    if across is not None:
        finite = across.agree(finite)
    good = [i for i, ok in enumerate(finite) if ok]
    if good:
        stepped = [adapters[i] for i in good]
        for name, new in zip(("weights", "exp_avg", "exp_avg_sq"), updates, strict=True):
            torch._foreach_copy_([getattr(adapter, name) for adapter in stepped], [new[i] for i in good])
        for adapter in stepped:
            adapter.step += 1
            adapter.refresh()
    torch._foreach_zero_([adapter.grad for adapter in adapters])
    for adapter in adapters:
        adapter.pending = False
    return [norm if ok else None for norm, ok in zip(norms, finite, strict=True)]


def _norms(grads: list[Tensor]) -> list[float]:
    """In float32, and once more where its squares overflow: finite where all elements are."""
    norms: list[float] = torch.stack(torch._foreach_norm(grads)).tolist()
    return [norm if math.isfinite(norm) else _wide_norm(grad) for norm, grad in zip(norms, grads, strict=True)]


def _wide_norm(grad: Tensor) -> float:
    """Float64 holds the square of any float32."""
    return float(torch.linalg.vector_norm(grad, dtype=torch.float64))


def _updates(
    adapters: Sequence[Adapter], params: Sequence[AdamParams], grads: list[Tensor], norms: Sequence[float]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """New weights, exp_avg and exp_avg_sq, [P] each, beside the old ones."""
    clips = [_clip_factor(p.grad_clip_norm, norm) for p, norm in zip(params, norms, strict=True)]
    if any(clip != 1.0 for clip in clips):
        grads = _scaled(grads, clips)
    exp_avg = list(torch._foreach_mul([adapter.exp_avg for adapter in adapters], [p.beta1 for p in params]))
    torch._foreach_add_(exp_avg, torch._foreach_mul(grads, [1 - p.beta1 for p in params]))
    exp_avg_sq = list(torch._foreach_mul([adapter.exp_avg_sq for adapter in adapters], [p.beta2 for p in params]))
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, [1 - p.beta2 for p in params])
    first = [1 - p.beta1 ** (adapter.step + 1) for adapter, p in zip(adapters, params, strict=True)]
    second = [1 - p.beta2 ** (adapter.step + 1) for adapter, p in zip(adapters, params, strict=True)]
    denominators = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(denominators, [math.sqrt(correction) for correction in second])
    torch._foreach_add_(denominators, [_float32(p.eps) for p in params])
    decays = [_float32(1 - p.learning_rate * p.weight_decay) for p in params]
    weights = list(torch._foreach_mul([adapter.weights for adapter in adapters], decays))
    sizes = [_float32(-p.learning_rate / correction) for p, correction in zip(params, first, strict=True)]
    torch._foreach_addcdiv_(weights, exp_avg, denominators, sizes)
    return weights, exp_avg, exp_avg_sq


def _scaled(grads: list[Tensor], factors: Sequence[float]) -> list[Tensor]:
    """A factor that float32 has no precise number for, as a huge gradient's may be, is multiplied in float64."""
    scaled = list(torch._foreach_mul(grads, factors))
    for i, (grad, factor) in enumerate(zip(grads, factors, strict=True)):
        if factor < torch.finfo(torch.float32).tiny:
            scaled[i] = grad.double().mul_(factor).float()
    return scaled


def _float32(value: float) -> float:
    """Infinity where float32 ends: torch refuses the number itself, and then nobody would step."""
    return value if abs(value) <= torch.finfo(torch.float32).max else math.copysign(math.inf, value)


def _clip_factor(limit: float, norm: float) -> float:
    """As torch.nn.utils.clip_grad_norm_; 0 is no limit."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0


def all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor's elements are all finite.

    A sum is the cheapest reduction that infinities and NaN survive. Since it may overflow, what it condemns is looked
    at element by element.
    """
    sums: list[bool] = torch.stack([tensor.sum() for tensor in tensors]).isfinite().tolist()
    return [ok or bool(tensor.isfinite().all()) for ok, tensor in zip(sums, tensors, strict=True)]
