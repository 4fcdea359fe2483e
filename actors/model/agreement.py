"""Whether two ways to compute one thing computed the same, as far as their precision can tell. Pure."""

import torch
from torch import Tensor


def agree(found: Tensor, expected: Tensor, *, same_operations: bool = False) -> bool:
    """By the norm of the error over that of what was expected, which rounding alone keeps far below sqrt(eps) of the
    dtype in a model of any depth, and a wrong computation does not. NaN agrees with nothing.

    `same_operations` in the same order leave less to rounding: then a bfloat16 model is not forgiven a softcap that
    changes its logits by a hundredth. Both of one shape; the coarser of their dtypes counts.
    """
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (found, expected))
    error = (found.double() - expected.double()).norm()
    return bool(error <= (max(eps, 1e-5) if same_operations else eps**0.5) * expected.double().norm())
