"""The frozen base's matrix products. Float32 on the CPU goes to oneDNN, whatever BLAS torch was built with.

Torch itself takes oneDNN for low precision alone, and MKL for float32, whose code for CPUs that are not Intel's is
slower. `python -m bench.products` prints by how much. No autograd: callers write their own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The operator that TorchInductor emits for a linear layer; absent from builds without oneDNN.
_onednn_linear: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, inputs], weight [outputs, inputs], bias [outputs] -> x weight.T + bias, [rows, outputs]."""
    if _onednn_linear is None or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    return _onednn_linear(x, weight, bias, "none", [], "")


def linear_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [rows, outputs], weight [outputs, inputs] -> the gradient of `linear`'s x: dy weight, [rows, inputs]."""
    return linear(dy, weight.T)
