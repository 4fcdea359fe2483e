"""LoRA of a decode step on the CPU, by a kernel in C++: `lora_rows.cpp`.

It reads each adapter's weights where they lie, once for all of its rows; nothing is copied and nothing filled up.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ...model.adapter import Adapter
from ...model.in_flight import Segment
from .kernel import kernel
from .walked import Walked

SHORT = 64
"""Tokens of a prompt for one adapter: with more of them the products of a BLAS cost less."""


class Bounds:
    """Segments of the packed row as the kernel takes them: of each its first row, the row behind its last, its rank."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        rows = [(segment.start, segment.end, segment.adapter.spec.rank) for segment in segments]
        self._adapters = [segment.adapter for segment in segments]
        self._bounds = torch.tensor(rows, dtype=torch.int64)
        self._scales = torch.tensor([adapter.spec.scale for adapter in self._adapters], dtype=torch.float32)
        self._addresses: dict[tuple[int, ...], Tensor] = {}  # [segments, 2 * layers] int64, A and B of each layer

    def add(self, layers: tuple[int, ...], x: Tensor, outputs: Sequence[Tensor]) -> None:
        """`layers` are the indices of those that read x [tokens, inputs]; adds to their `outputs` in place."""
        if layers not in self._addresses:
            self._addresses[layers] = torch.tensor([_addresses(adapter, layers) for adapter in self._adapters])
        kernel()(x.contiguous(), outputs, self._bounds, self._addresses[layers], self._scales)


class NativeRows:
    """As `Gathered`, for float32 on the CPU, after `load_kernel`."""

    def __init__(self, groups: Sequence[tuple[int, ...]]) -> None:
        self._groups = groups
        self._bounds: Bounds | None = None

    def arrange(self, adapters: Sequence[Adapter], counts: Sequence[int], device: torch.device) -> bool:
        ends = list(accumulate(counts))
        rows = zip(adapters, counts, ends, strict=True)
        self._bounds = Bounds([Segment(adapter, end - count, end) for adapter, count, end in rows])
        return bool(adapters)

    def clear(self) -> None:
        self._bounds = None

    def add(self, group: int, x: Tensor, outputs: Sequence[Tensor]) -> None:
        assert self._bounds is not None, "arrange comes first"
        self._bounds.add(self._groups[group], x, outputs)


class NativeWalked(Walked):
    """As `Walked`, for float32 on the CPU, after `load_kernel`."""

    def add(self, group: int, segments: Sequence[Segment], x: Tensor, outputs: Sequence[Tensor]) -> None:
        short = [segment for segment in segments if segment.end - segment.start <= SHORT]
        if short:
            Bounds(short).add(self._groups[group], x, outputs)
        super().add(group, [segment for segment in segments if segment.end - segment.start > SHORT], x, outputs)


def _addresses(adapter: Adapter, layers: tuple[int, ...]) -> list[int]:
    """Of memory that the adapter holds; float32 on the CPU never moves."""
    parts = [adapter.part(index) for index in layers]
    return [address for part in parts for address in ((part.a.data_ptr(), part.b.data_ptr()) if part else (0, 0))]
