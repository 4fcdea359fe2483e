"""What a base model and its adapters take of memory, from a configuration alone: modules are built without weights."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ...wire.errors import UnsupportedModelError
from ...wire.types import Quantization
from .lineup import LINE_UP
from .loading import auto_class, configuration_of, plain
from .nf4 import NF4_BYTES
from .shards import Heads, divided, heads_of, own_target
from .spec import AdapterSpec, Target, shapes_of
from .targets import Site, Sites, find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASS_TOKENS = 1024
_NUMBERS_OF_TOKEN = 26
"""Of hidden size, that a layer keeps of a token for the backward: measured on a dense model (docs/performance.md)."""
_WHOLE_NUMBERS = 6
"""Of those, what every device keeps of a model that several share: metered, as `training.foreseen` does."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """`cache_numbers` are those that keys and values of one token take in all layers."""

    parameters: int
    cache_numbers: int
    layers: int
    hidden: int
    sites: Sites
    heads: Heads
    is_tied: bool = False
    kept_numbers: float = _NUMBERS_OF_TOKEN

    def adapter_parameters(self, spec: AdapterSpec) -> int:
        targets = [target for target in self.sites.targets if target.group in spec.groups]
        return sum(math.prod(shape) for target in targets for shape in shapes_of(spec, target))

    def adapter_bytes(self, spec: AdapterSpec, itemsize: int) -> int:
        """On the device, where it trains: weights, gradient and two moments in float32, and a copy that computes where
        the base has another dtype, of `itemsize` bytes."""
        return self.adapter_parameters(spec) * (16 + (itemsize if itemsize != 4 else 0))

    def weights_bytes(self, itemsize: int, quantize: Quantization = "none") -> int:
        """Of the base: what adapters train is what is quantised, but for the head."""
        if quantize == "none":
            return self.parameters * itemsize
        quantised = [target for target in self.sites.targets if target.group != "unembed"]
        numbers = sum(target.inputs * target.outputs * (target.experts or 1) for target in quantised)
        return (self.parameters - numbers) * itemsize + int(numbers * NF4_BYTES)

    def of_rank(self, ranks: int) -> "Sizing":
        """What each of so many devices has at most. Raises UnsupportedModelError where they cannot share the model."""
        if ranks == 1:
            return self
        if self.sites.frozen_experts:
            raise UnsupportedModelError(f"experts that are {self.sites.frozen_experts} are not known to be divided")
        last = divided(self.sites.targets, self.heads, ranks - 1, ranks)  # what is left over is the last one's
        saved = sum(
            _numbers(whole) - _numbers(own)
            for whole, own in zip(self.sites.targets, last, strict=True)
            if not (self.is_tied and own.group == "unembed")  # the embeddings, which all have
        )
        sites = Sites(tuple(Site(nn.Identity(), (own_target(target),)) for target in last), None)
        cached = -(-self.heads.keys // ranks)
        return replace(
            self,
            parameters=self.parameters - saved,
            cache_numbers=self.cache_numbers // self.heads.keys * cached,
            sites=sites,
            kept_numbers=_WHOLE_NUMBERS + (_NUMBERS_OF_TOKEN - _WHOLE_NUMBERS) / ranks,
        )

    def least_ranks(self, spec: AdapterSpec, itemsize: int, device_bytes: int) -> int | None:
        """Of how many devices of so many bytes the fewest do; None where no number up to 64 does."""
        for ranks in range(1, 65):
            with suppress(UnsupportedModelError):
                if self.of_rank(ranks).least_bytes(spec, itemsize) <= device_bytes:
                    return ranks
        return None

    def pass_bytes(self, itemsize: int) -> int:
        """Of a training pass of PASS_TOKENS tokens, about."""
        return int(PASS_TOKENS * self.kept_numbers * self.layers * self.hidden * itemsize)

    def least_bytes(self, spec: AdapterSpec, itemsize: int, quantize: Quantization = "none") -> int:
        """The weights, one adapter of `spec`, and a pass over it."""
        return self.weights_bytes(itemsize, quantize) + self.adapter_bytes(spec, itemsize) + self.pass_bytes(itemsize)


def size_of(model: str) -> Sizing:
    """Of a folder with a config.json, a name of the line-up, or a hub id. Raises UnsupportedModelError."""
    return sizing(described(model))


def sizing(config: PreTrainedConfig) -> Sizing:
    with torch.device("meta"):
        built = _built(config)
    text = config.get_text_config()
    return Sizing(
        parameters=sum(parameter.numel() for parameter in built.parameters()),
        cache_numbers=text.num_hidden_layers * _cache_numbers(text),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        sites=find_sites(built),
        heads=heads_of(text),
        is_tied=bool(text.tie_word_embeddings),
    )


def described(model: str) -> PreTrainedConfig:
    """The configuration of a model by its name. Raises UnsupportedModelError."""
    if not Path(model).is_dir() and model in LINE_UP:
        return configuration(LINE_UP[model])
    try:
        return plain(configuration_of(model))
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        known = ", ".join(LINE_UP)
        raise UnsupportedModelError(f"no configuration of {model!r}: {reason}. Known by name are {known}") from error


def configuration(dimensions: Mapping[str, Any]) -> PreTrainedConfig:
    """Of an entry of the line-up."""
    rest = dict(dimensions)
    return AutoConfig.for_model(rest.pop("model_type"), **rest)


def _built(config: PreTrainedConfig) -> "PreTrainedModel":
    try:
        return auto_class(config).from_config(config)
    except ValueError as error:  # a configuration of none of its models
        reason = str(error).splitlines()[0]
        raise UnsupportedModelError(f"transformers builds no decoder of a {type(config).__name__}: {reason}") from error


def _numbers(target: Target) -> int:
    """Of the layer's weight that this device has."""
    if target.expert_weight is None:
        return math.prod(target.own_sizes)
    count = target.expert_weight.count if target.shard is None else target.shard.end - target.shard.start
    return count * target.inputs * target.outputs


def _cache_numbers(text: PreTrainedConfig) -> int:
    """Of one layer. Multi-head latent attention is kept as the keys and values that it expands to."""
    if getattr(text, "kv_lora_rank", None):
        return text.num_attention_heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_key_value_heads * width
