"""The batch in flight: what attention and LoRA layers read instead of ten extra arguments.

One object per loaded model, owned by the engine; it is filled before a forward and never read across two batches.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from .adapters import Adapter


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` to `end` of the packed row belong to `adapter`. Tokens in no segment see the bare base model."""

    adapter: "Adapter"
    start: int
    end: int


class AttentionCache(Protocol):
    """Keys and values of sequences that are being decoded; attention hands it what is new and gets its output."""

    def attend(
        self,
        layer: int,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        scaling: float,
        sliding_window: int | None,
        sinks: "torch.Tensor | None",
    ) -> "torch.Tensor":
        """query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim] -> [1, heads, tokens, dim]."""
        ...


class LinearLayer(Protocol):
    """One trainable linear layer of the base model; `index` is its place in model order."""

    weight: "torch.Tensor"
    bias: "torch.Tensor | None"
    index: int
    in_features: int


class Linears(Protocol):
    """Takes the trainable linear layers over, in inference."""

    def linear(self, module: LinearLayer, x: "torch.Tensor") -> "torch.Tensor":
        """x [..., inputs] with the packed row's tokens in its leading axes -> [..., outputs], adapters included."""
        ...


@dataclass(slots=True)
class InFlight:
    """`lengths` are those of the sequences laid end to end in the packed row, in order. Where `stacked` is there, it
    computes the trainable layers, and `segments` are those of the tokens that it does not cover."""

    lengths: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    cache: AttentionCache | None = None
    stacked: Linears | None = None
