"""Weights of the frozen base in 4 bits, as QLoRA has them: NF4 with factors that are quantised, too, by bitsandbytes.

They are expanded when they are used, one at a time. Adapters, their gradients and the output head stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...wire.errors import UnsupportedModelError
from .targets import EYES

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

NF4_BYTES = (4 + 8 / 64 + 32 / 64 / 256) / 8
"""Of a number: its code, the byte that 64 of them have for a factor, and the float32 that 256 of those bytes have."""


def nf4_config(dtype: torch.dtype, *, can_see: bool) -> "BitsAndBytesConfig":
    """Of a model that computes in `dtype`: one that `can_see` keeps its eyes as they are, for they are a small part of
    it. Raises UnsupportedModelError where bitsandbytes is not installed."""
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UnsupportedModelError("--quantize needs bitsandbytes, which is not installed: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*(f"model.{name}" for name in sorted(EYES)), "lm_head"] if can_see else None,
    )


def keep_readable(model: "PreTrainedModel") -> None:
    """On some processors its own forward rewrites a layer's weight in a form that nothing else reads."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def is_quantised(linear: nn.Linear) -> bool:
    return getattr(linear.weight, "quant_state", None) is not None


def weight_of(linear: nn.Linear) -> Tensor:
    """[outputs, inputs], expanded if it is quantised: a new tensor each time."""
    state = getattr(linear.weight, "quant_state", None)
    return linear.weight if state is None else _expanded(linear.weight, state)


@dataclass(frozen=True, slots=True)
class Stack:
    """A layer's routed experts, each quantised by itself: stands for [n, outputs, inputs], or with the last two the
    other way round."""

    packed: Sequence[Tensor]
    states: Sequence[Any]
    is_turned: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, columns = self.states[0].shape
        return (len(self.packed), columns, rows) if self.is_turned else (len(self.packed), rows, columns)

    @property
    def nbytes(self) -> int:
        return sum(map(_nbytes, self.packed, self.states))

    @property
    def mT(self) -> "Stack":
        return Stack(self.packed, self.states, not self.is_turned)

    def unbind(self) -> "Stack":
        return self

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> Tensor:
        """Expanded."""
        weight = _expanded(self.packed[index], self.states[index])
        return weight.mT if self.is_turned else weight


def stacked(weights: Tensor) -> Stack:
    """Of [n, outputs, inputs]."""
    from bitsandbytes.functional import quantize_4bit

    quantise = cast(Any, quantize_4bit)
    each = [quantise(weight.contiguous(), compress_statistics=True, quant_type="nf4") for weight in weights]
    packed, states = zip(*each, strict=True)
    return Stack(packed, states)


def nbytes_of(linear: nn.Linear) -> int:
    """What its weight takes."""
    state = getattr(linear.weight, "quant_state", None)
    return linear.weight.nbytes if state is None else _nbytes(linear.weight, state)


def _nbytes(packed: Tensor, state: Any) -> int:
    """With the factors of its blocks, and the factors of those."""
    return packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes


def _expanded(packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return cast(Any, dequantize_4bit)(packed, state)
