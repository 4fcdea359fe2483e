"""What one token through the model tells about it: the shapes of its keys and values, and which layers share an input.

It runs before anything else does, and keeps nothing of what it computed.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attend_sequences
from .base_model import BaseModel
from .in_flight import LinearLayer
from .lora import layers_of


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: for each of `kv_heads` a key of `dim` and a value of `value_dim` numbers."""

    kv_heads: int
    dim: int
    value_dim: int

    @property
    def width(self) -> int:
        return self.dim + self.value_dim


@dataclass(frozen=True, slots=True)
class Survey:
    """`layers` by the attention layer's index. `groups` are the indices of trainable modules that read one tensor, as
    the projections to queries, keys and values do; every such module is in one group."""

    layers: dict[int, LayerShape]
    groups: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """What keys and values of one token take, in all layers."""
        return sum(shape.kv_heads * shape.width for shape in self.layers.values()) * self.dtype.itemsize


def survey(base: BaseModel) -> Survey:
    token = torch.zeros(1, dtype=torch.int64, device=base.device)
    with torch.inference_mode(), standing_in(base) as notes:
        base.logits(base.hidden_states(token, token, grad=False))
    return Survey(notes.layers, notes.groups, base.dtype)


@contextmanager
def standing_in(base: BaseModel) -> Generator["Notes"]:
    """Inside, the model may run on one sequence without a cache or adapters."""
    in_flight, notes = base.in_flight, Notes(layers_of(base))
    in_flight.cache, in_flight.linears = notes, notes
    try:
        yield notes
    finally:
        in_flight.cache, in_flight.linears = None, None


@dataclass(slots=True)
class Notes:
    """Stands where the cache and the adapters would. It holds every input, so that no two have one identity."""

    modules: Mapping[int, LinearLayer]
    layers: dict[int, LayerShape] = field(default_factory=dict[int, LayerShape])
    inputs: list[tuple[Tensor, list[int]]] = field(default_factory=list[tuple[Tensor, list[int]]])

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(modules) for _, modules in self.inputs)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self.layers[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return attend_sequences(query, key, value, [query.shape[2]], scaling, sliding_window, sinks).transpose(1, 2)

    def linear(self, index: int, x: Tensor) -> Tensor:
        if not self.inputs or self.inputs[-1][0] is not x:
            self.inputs.append((x, []))
        self.inputs[-1][1].append(index)
        return F.linear(x, self.modules[index].weight, self.modules[index].bias)


def block_count(memory_bytes: int, token_bytes: int, block_tokens: int) -> int:
    """How many blocks fit into that much memory, at least one."""
    return max(1, memory_bytes // (token_bytes * block_tokens))
