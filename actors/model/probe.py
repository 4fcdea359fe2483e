"""Stands where a cache of keys and values would: it attends within one sequence, and notes which layers asked it to."""

from dataclasses import dataclass, field

from torch import Tensor

from .attention import attend_sequences


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: for each of `kv_heads` a key of `dim` and a value of `value_dim` numbers."""

    kv_heads: int
    dim: int
    value_dim: int

    @property
    def width(self) -> int:
        return self.dim + self.value_dim


@dataclass(slots=True)
class AttentionProbe:
    """`layers` by the attention layer's index."""

    layers: dict[int, LayerShape] = field(default_factory=dict[int, LayerShape])

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
        output = attend_sequences(query, key, value, [query.shape[2]], scaling, sliding_window, sinks)
        return output.transpose(1, 2)  # [1, heads, tokens, value_dim]
