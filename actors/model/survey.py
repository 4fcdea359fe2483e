"""What one token through the model tells about it: the shapes of its keys and values, and which layers share an input.

It runs before anything else does, and keeps nothing of what it computed.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .base_model import BaseModel
from .experts import RoutedExperts
from .in_flight import LinearLayer
from .lora import experts_of, layers_of
from .probe import AttentionProbe, LayerShape


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
    return Survey(notes.attention.layers, notes.groups, base.dtype)


@contextmanager
def standing_in(base: BaseModel) -> Generator["Notes"]:
    """Inside, the model may run on one sequence without a cache or adapters."""
    in_flight, notes = base.in_flight, Notes(layers_of(base), experts_of(base))
    in_flight.cache, in_flight.linears = notes.attention, notes
    try:
        with base.alone():
            yield notes
    finally:
        in_flight.cache, in_flight.linears = None, None


@dataclass(slots=True)
class Notes:
    """Stands where the adapters would. It holds every input, so that no two have one identity."""

    modules: Mapping[int, LinearLayer]
    mixtures: Mapping[int, RoutedExperts]
    attention: AttentionProbe = field(default_factory=AttentionProbe)
    inputs: list[tuple[Tensor, list[int]]] = field(default_factory=list[tuple[Tensor, list[int]]])

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(modules) for _, modules in self.inputs)

    def linear(self, index: int, x: Tensor) -> Tensor:
        if not self.inputs or self.inputs[-1][0] is not x:
            self.inputs.append((x, []))
        self.inputs[-1][1].append(index)
        return F.linear(x, self.modules[index].weight, self.modules[index].bias)

    def experts(self, index: int, hidden: Tensor, chosen: Tensor, counted: Tensor) -> Tensor:
        return self.mixtures[index].compute(hidden, chosen, counted)


def block_count(memory_bytes: int, token_bytes: int, block_tokens: int) -> int:
    """How many blocks fit into that much memory, at least one."""
    return max(1, memory_bytes // (token_bytes * block_tokens))
