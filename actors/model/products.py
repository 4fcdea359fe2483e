"""The frozen base's matrix products. Float32 on the CPU goes to oneDNN where that is the faster.

Torch itself takes oneDNN for low precision alone, and MKL for float32, whose AVX-512 is for Intel's processors alone,
and which is slower with few rows on any. `python -m bench.products` prints by how much. No autograd: callers write
their own.
"""

import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .nf4 import Stack

# The operators that TorchInductor emits for a linear layer; absent from builds without oneDNN.
_onednn_linear: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
_onednn_pack: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None) if _onednn_linear is not None else None

_ONEDNN_ROWS = sys.maxsize if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64
"""The most rows with which oneDNN is the faster. Which is taken depends on the processor and the shape alone: what is
computed again after a restart is the same to the last bit."""

_FEW_ROWS = 16
"""The rows that packed weights are laid out for: decode steps have about so many, and with more the layout is no worse
than the plain one."""

_WIDENED_ELEMENTS = 2**22
"""So many of a weight are in float32 at a time, 16 MiB."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, inputs], weight [outputs, inputs], bias [outputs] -> x weight.T + bias, [rows, outputs]."""
    if _onednn_linear is None or len(x) > _ONEDNN_ROWS or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    return _onednn_linear(x, weight, bias, "none", [], "")


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear`, with float32 out of low precision too: no sum is rounded. For logits, where half a unit in the last
    place of bfloat16 is a difference of 0.03 in a logprob.
    """
    if x.dtype == torch.float32:
        return linear(x, weight, bias)
    if x.device.type == "cuda":
        y = torch.mm(x, weight.T, out_dtype=torch.float32)
    else:
        y, x = x.new_empty(len(x), len(weight), dtype=torch.float32), x.float()
        step = max(1, _WIDENED_ELEMENTS // weight.shape[1])
        for start in range(0, len(weight), step):
            y[:, start : start + step] = linear(x, weight[start : start + step].float())
    return y if bias is None else y.add_(bias)


def linear_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [rows, outputs], weight [outputs, inputs] -> the gradient of `linear`'s x: dy weight, [rows, inputs]."""
    return linear(dy, weight.T)


def linear_of_each(
    x: Tensor, weights: Tensor | Stack, biases: Tensor | None, counts: Sequence[int], y: Tensor
) -> Generator[int]:
    """Neighbouring `counts[i]` rows through `weights[i]`: x [rows, inputs], weights [n, outputs, inputs], biases
    [n, outputs], y [rows, outputs]. Of quantised ones those are expanded that have rows.

    Yields each i as soon as its rows of `y` are there: to add to them costs least while they are in the cache. It is
    torch's own product, which writes where it is told to; a copy costs more than oneDNN gains with so few rows.
    """
    each, pieces = weights.mT.unbind(), (x.split_with_sizes(counts), y.split_with_sizes(counts))
    for i, (rows, to) in enumerate(zip(*pieces, strict=True)):
        if not len(rows):
            pass
        elif biases is None:
            torch.mm(rows, each[i], out=to)
        else:
            torch.addmm(biases[i], rows, each[i], out=to)
        yield i


@dataclass(frozen=True, slots=True)
class Packed:
    """Layers that read one tensor, as one product. `weight` is a copy in a layout that only oneDNN can read."""

    weight: Tensor
    bias: Tensor | None  # [outputs of all]

    def linear(self, x: Tensor) -> Tensor:
        """x [rows, inputs] -> [rows, outputs of all]."""
        return _onednn_linear(x, self.weight, self.bias, "none", [], "")


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Packed | None:
    """weights [outputs, inputs] and biases [outputs] of layers that read one tensor.

    None where packing gains nothing, or cannot be done: only float32 on the CPU is packed.
    """
    first = weights[0]
    if _onednn_pack is None or first.dtype != torch.float32 or first.device.type != "cpu":
        return None
    bias = None
    if any(b is not None for b in biases):
        known = zip(weights, biases, strict=True)
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in known])
    together = first.detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
    return Packed(_onednn_pack(together, _FEW_ROWS), bias)
