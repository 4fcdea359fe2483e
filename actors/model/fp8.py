"""Checkpoints in FP8 with a factor for each block, as DeepSeek-V3.1 is published: a quantiser of transformers'.

A weight whose rows or columns are no multiple of the block ends in blocks that are cut off: the 576 rows of
DeepSeek-V3's kv_a_proj are four blocks of 128 and half a one. transformers' own divides such a weight into blocks of
one size, and so gives other weights, or refuses where it cannot.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

CUT_OFF = "fp8_cut_off"
"""The name of the quantiser, for `quant_method`."""


class _Dequantize(Fp8Dequantize):
    def convert(self, input_dict: Mapping[str, Tensor | list[Tensor]], *args: Any, **options: Any) -> Any:
        """Where a block is cut off, every element of the weight has the factor to itself."""
        block: Sequence[int] | None = cast(Any, self).hf_quantizer.quantization_config.weight_block_size
        spread = dict(input_dict)
        for key, weights in input_dict.items():
            factors = input_dict.get(scales := f"{key}_scale_inv")
            if factors is not None and block is not None:
                spread[scales] = [_spread(w, s, block) for w, s in zip(_all(weights), _all(factors), strict=True)]
        return super().convert(spread, *args, **options)


@register_quantizer(CUT_OFF)
class _Quantizer(FineGrainedFP8HfQuantizer):
    def get_load_operations(self) -> dict[str, type]:
        return {"dequantize": _Dequantize}


register_quantization_config(CUT_OFF)(FineGrainedFP8Config)


def _all(tensors: Tensor | list[Tensor]) -> list[Tensor]:
    return tensors if isinstance(tensors, list) else [tensors]


def _spread(weight: Tensor, factors: Tensor, block: Sequence[int]) -> Tensor:
    """[rows / block, columns / block] -> [rows, columns] where a block is cut off."""
    rows, columns = weight.shape[-2:]
    if rows % block[0] == 0 and columns % block[1] == 0:
        return factors
    return factors.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
