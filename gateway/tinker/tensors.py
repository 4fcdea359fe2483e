"""Tensors as clients send them, dense or in compressed sparse rows: checked before they take memory, then unfolded."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...wire.codec import MAX_PAYLOAD_BYTES
from ...wire.errors import InvalidRequestError
from ..errors import MalformedBodyError


def check_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """A sparse tensor's shape is the sender's word alone: what it unfolds to is checked before it does."""
    if any(n < 0 for n in shape) or math.prod(shape) * 8 > MAX_PAYLOAD_BYTES:
        raise InvalidRequestError.of(f"{name}.shape", list(shape), f"at most {MAX_PAYLOAD_BYTES // 8:,} elements")
    return tuple(shape)


def fill(name: str, values: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if math.prod(shape) != values.size:
        raise MalformedBodyError(f"{name} has {values.size} elements, which do not fill shape {list(shape)}")
    return values.reshape(shape)


def unfold(
    name: str,
    values: npt.NDArray[Any],
    starts: npt.NDArray[Any],
    columns: npt.NDArray[Any],
    shape: tuple[int, ...],
    blank: int = 0,
) -> npt.NDArray[Any]:
    """Compressed rows to a dense [rows, columns]; what is not listed is `blank`."""
    counts = np.diff(starts)
    fits = len(shape) == 2 and len(starts) == shape[0] + 1 and len(values) == len(columns) == starts[-1]
    if not fits or starts[0] != 0 or (counts < 0).any() or ((columns < 0) | (columns >= shape[1])).any():
        raise MalformedBodyError(f"{name}: its row and column indices do not describe a tensor of shape {list(shape)}")
    dense = np.full(shape, blank, values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense
