"""What the first of several ranks asks of the others: to do what it does, at the same time.

Where a base model is one device's alone there is no `Division`, and none of this runs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
import torch
from torch import Tensor

from ...wire.types import AdamParams, TensorData
from ..images.layout import Seen
from .adapter import Adapter
from .in_flight import Segment
from .ranks import Ranks

T = TypeVar("T")


class Lead(Protocol):
    """The first rank's hold on the others."""

    def run(self, command: msgspec.Struct, mine: Callable[[], T]) -> T:
        """The other ranks execute `command` while this one does `mine`, whose sums and copies meet theirs.

        Raises what `mine` raises, or for another rank that failed MemoryError where its memory ran out, and otherwise
        RuntimeError. All ranks are together again then, and what they executed counts for nothing. It may be called
        twice, so `mine` must bear that. Where ranks cannot part, all of them end instead.
        """
        ...

    def numbers_of(self, segments: Sequence[Segment], *, train: bool = False) -> "list[Stretch]":
        """The segments, as all ranks know their adapters, of which each has its part now; `train`, with a gradient that
        will be pending."""
        ...

    def all_finite(self, adapters: Sequence[Adapter]) -> list[bool]:
        """Whether the gradients are, on every rank."""
        ...

    def adam_step(self, adapters: Sequence[Adapter], params: Sequence[AdamParams]) -> Iterator[float | None]:
        """As `training.adam.adam_step`."""
        ...


@dataclass(frozen=True, slots=True)
class Division:
    """Of a base model among `ranks`, of which `widths` are how much of the vocabulary each has. `lead` is the first
    rank's."""

    ranks: Ranks
    widths: tuple[int, ...]
    lead: Lead | None = None


class Stretch(msgspec.Struct, frozen=True, array_like=True):
    """A segment as it travels: the adapter's number, first token, the one behind the last."""

    adapter: int
    start: int
    end: int


class SeenHead(msgspec.Struct, frozen=True):
    """What follows of images: rows at `places`, once and once more for each of `layers`."""

    places: TensorData
    layers: int


def seen_head(seen: Seen | None) -> SeenHead | None:
    return None if seen is None else SeenHead(packed(seen.places), len(seen.layers))


def share_seen(seen: Seen, ranks: Ranks, dtype: torch.dtype) -> Seen:
    """On the first rank as it is, on the others as on the first."""
    embeddings, *layers = (ranks.from_first(x.to(dtype).contiguous()) for x in (seen.embeddings, *seen.layers))
    return Seen(seen.places, embeddings, tuple(layers))


def unseen(head: SeenHead, hidden: int, device: torch.device, dtype: torch.dtype) -> Seen:
    """Room for what follows."""
    places = unpacked(head.places, device)
    rows = [torch.empty(len(places), hidden, dtype=dtype, device=device) for _ in range(head.layers + 1)]
    return Seen(places, rows[0], tuple(rows[1:]))


def packed(numbers: Tensor | Sequence[int]) -> TensorData:
    return TensorData.from_torch(numbers) if isinstance(numbers, Tensor) else TensorData(numbers, "int64")


def unpacked(data: TensorData, device: torch.device) -> Tensor:
    return data.to_torch().to(device)
