"""Reads a model of transformers from a local folder or a hub id, and one that was published quantised as the weights
that it stands for: in MXFP4 (GPT-OSS), in FP8 with a factor for each block (DeepSeek-V3.1), or in INT4 as
compressed-tensors packs it (Kimi-K2-Thinking). transformers expands them tensor by tensor while it reads the files.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from ...wire.errors import UnsupportedModelError
from ...wire.types import Quantization
from .memory import give_back_freed
from .nf4 import keep_readable, nf4_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXPANDED = ("mxfp4", "fp8", "compressed-tensors")
_EXPANDS_RIGHT = Version("5.23")
"""Of transformers: the oldest that was tried and gave the right weights. 5.5.4 gives others, and says nothing."""
_SAME_AS = {"kimi_k2": "deepseek_v3"}
"""Families that are another's under a name of their own, with code beside the weights that need not be run."""


def load_model(
    path: str | Path,
    dtype: str,
    *,
    trust_remote_code: bool = False,
    quantize: Quantization = "none",
    device: str | None = None,
) -> "PreTrainedModel":
    """`dtype` "auto" is the checkpoint's own; otherwise the name of a torch dtype.

    `quantize` nf4: linear layers but the output head are in 4 bits, made while the files are read, on `device`.
    Code that lies beside the weights is not run, unless `trust_remote_code`. Raises UnsupportedModelError.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UnsupportedModelError(f"dtype is {dtype!r}, expected 'auto', 'float32', 'bfloat16' or 'float16'")
    try:
        config = configuration_of(str(path), trust_remote_code=trust_remote_code)
        is_expanded = _expand(config)
        how = {} if quantize == "none" else _in_4_bits(config, dtype, device, is_expanded=is_expanded)
        model: PreTrainedModel = auto_class(config).from_pretrained(
            str(path), config=config, dtype=dtype, trust_remote_code=trust_remote_code, **how
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UnsupportedModelError(f"cannot load a base model from {str(path)!r}: {reason}") from error
    if is_expanded and dtype != "auto":
        for parameter in model.parameters():
            if parameter.dtype == torch.bfloat16:  # as some formats are expanded, whatever was asked for
                parameter.data = parameter.data.to(getattr(torch, dtype))
    keep_readable(model)
    give_back_freed()  # as much as the files, where they were expanded
    return model


def without_weights(path: str | Path) -> "PreTrainedModel":
    """The model that `load_model` would load, on the meta device. Raises UnsupportedModelError."""
    try:
        config = configuration_of(str(path))
        with torch.device("meta"):
            return auto_class(config).from_config(plain(config))
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(f"no base model is described in {str(path)!r}: {reason}") from error


def auto_class(config: PreTrainedConfig) -> Any:
    """Of transformers, what builds the decoder: one that can see is known by another name there."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def plain(config: PreTrainedConfig) -> PreTrainedConfig:
    """Changed in place to that of the model that a quantised one is expanded to."""
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    return config


def configuration_of(path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Raises OSError, ValueError and KeyError where transformers knows none."""
    described: dict[str, Any] = PreTrainedConfig.get_config_dict(path)[0]
    if (known := _SAME_AS.get(described.get("model_type", ""))) is None:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    own = ("model_type", "architectures", "auto_map")
    return AutoConfig.for_model(known, **{name: value for name, value in described.items() if name not in own})


def _in_4_bits(config: PreTrainedConfig, dtype: str, device: str | None, *, is_expanded: bool) -> dict[str, Any]:
    """What `from_pretrained` is to be told."""
    if is_expanded:
        raise UnsupportedModelError("the checkpoint is quantised already: serve it without --quantize")
    own: torch.dtype | None = getattr(config, "dtype", None)
    computes = getattr(torch, dtype) if dtype != "auto" else own or torch.float32
    return {
        "quantization_config": nf4_config(computes, can_see=auto_class(config) is AutoModelForImageTextToText),
        "device_map": {"": device or "cpu"},
    }


def _expand(config: PreTrainedConfig) -> bool:
    """Where the checkpoint is quantised, lets it be read as plain weights; whether it is."""
    quantised: Any = getattr(config, "quantization_config", None)
    if quantised is None:
        return False
    facts: dict[str, Any] = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = str(facts.get("quant_method"))
    if method not in _EXPANDED:
        raise UnsupportedModelError(f"the checkpoint is quantised by {method!r}, expected one of {_EXPANDED}, or none")
    if Version(transformers.__version__) < _EXPANDS_RIGHT:
        raise UnsupportedModelError(
            f"the checkpoint is quantised, which transformers reads as plain weights from {_EXPANDS_RIGHT} on: "
            f"{transformers.__version__} is installed"
        )
    own = {"quant_method": _fp8_quantiser()} if method == "fp8" else {}
    config.quantization_config = facts | own | {"dequantize": True}
    return True


def _fp8_quantiser() -> str:
    from .fp8 import CUT_OFF  # which older transformers cannot import

    return CUT_OFF
