"""The decoding rows of a step as tensors: made when a row joins or leaves, and kept up to date in place until then.

It reads rows and tables of blocks; it runs no model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.in_flight import Segment
from .decode_linears import DecodeLinears
from .kv_cache import KVCache, Reading
from .sequences import Request, Row
from .tokens import SamplingRows

if TYPE_CHECKING:
    from ..model.adapter import Adapter


class DecodeBatch:
    """`rows` in the order of the packed row: those of one adapter side by side, those of the bare base last.

    `gathered` says that `linears` gathers what the adapters have; otherwise the `segments` are to be walked.
    """

    def __init__(self, rows: Sequence[Row], linears: DecodeLinears, cache: KVCache, device: torch.device) -> None:
        self._cache, self._device = cache, device
        adapters = list(dict.fromkeys(row.request.adapter for row in rows if row.request.adapter is not None))
        self.rows = [row for adapter in (*adapters, None) for row in rows if row.request.adapter is adapter]
        counts = [sum(row.request.adapter is adapter for row in rows) for adapter in adapters]
        self.gathered = linears.arrange(adapters, counts, device)
        owners = [row.request.adapter for row in self.rows]
        self.segments = segments_of(owners, [1] * len(rows))
        self.sampling = sampling_rows(self.rows, device)
        self.tokens = torch.tensor([row.tokens[-1] for row in self.rows], dtype=torch.int64, device=device)  # [rows]
        self.places = torch.tensor([row.held.computed for row in self.rows], dtype=torch.int64, device=device)
        offsets = [0 if row.request.images is None else row.request.images.offset for row in self.rows]
        self.offsets = torch.tensor(offsets, dtype=torch.int64, device=device) if any(offsets) else None
        self.readings: list[Reading] = []
        self._starts = torch.empty(0)  # [rows] int64: the slot of the first token of each row's last block
        self._blocks = -1

    def refresh(self) -> None:
        """Before a step: rows may have new blocks."""
        blocks = sum(len(row.held.blocks) for row in self.rows)
        if blocks != self._blocks:
            self._blocks = blocks
            self.readings = self._cache.plan_readings([row.held.blocks for row in self.rows])
            last = torch.tensor([row.held.blocks[-1] for row in self.rows], dtype=torch.int64, device=self._device)
            self._starts = last * self._cache.block_tokens

    @property
    def positions(self) -> Tensor:
        """As the model counts them, [rows] int64: after images not the tokens' places in their sequences."""
        return self.places if self.offsets is None else self.places + self.offsets

    @property
    def slots(self) -> Tensor:
        """Where the new keys and values go, [rows] int64."""
        return self._starts + self.places % self._cache.block_tokens

    def advance(self, tokens: Tensor) -> None:
        """`tokens` [rows] int64 were sampled."""
        self.tokens = tokens
        self.places += 1


def sampling_rows(rows: Sequence[Row], device: torch.device) -> SamplingRows:
    requests: list[Request] = [row.request for row in rows]
    wants_top = [request.top_sample > 0 for request in requests]
    return SamplingRows.of([request.params for request in requests], [row.seed for row in rows], wants_top, device)


def segments_of(adapters: "Sequence[Adapter | None]", lengths: Sequence[int], start: int = 0) -> list[Segment]:
    """Of sequences of these lengths laid end to end from `start`; neighbours with one adapter share a segment."""
    segments: list[Segment] = []
    for adapter, length in zip(adapters, lengths, strict=True):
        end = start + length
        if adapter is not None:
            if segments and segments[-1].adapter is adapter and segments[-1].end == start:
                start = segments.pop().start
            segments.append(Segment(adapter, start, end))
        start = end
    return segments
