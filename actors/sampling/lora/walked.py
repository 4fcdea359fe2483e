"""LoRA of a decode step, from segment to segment: where few adapters have the rows, or a prompt has them.

What of A belongs to layers that read one tensor is multiplied at once. It computes no gradient.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.adapter import Adapter, Part
from ...model.in_flight import Segment


@dataclass(frozen=True, slots=True)
class Stack:
    """What an adapter has of one group of layers: A side by side, and where each layer's columns are in it."""

    a: Tensor  # [inputs, layers * rank]
    columns: dict[int, slice]  # by the layer's place in the group


class Walked:
    """`groups` are the indices of layers that read one tensor, in the order in which they do."""

    def __init__(self, groups: Sequence[tuple[int, ...]]) -> None:
        self._groups = groups
        self._stacks: dict[Adapter, dict[int, Stack | None]] = {}

    def retain(self, adapters: Collection[Adapter]) -> None:
        """Drops what was made for any others."""
        for adapter in [adapter for adapter in self._stacks if adapter not in adapters]:
            del self._stacks[adapter]

    def add(self, group: int, segments: Sequence[Segment], x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Adds scale (x A.T) B to the outputs of the group's layers, [tokens, outputs] each, in place.

        x [tokens, inputs].
        """
        indices = self._groups[group]
        for segment in segments:
            adapter = segment.adapter
            stack = self._stack(adapter, group)
            if stack is None:
                continue
            down = torch.mm(x[segment.start : segment.end], stack.a)  # [rows, layers * rank]
            for i, columns in stack.columns.items():
                part = adapter.part(indices[i])
                assert part is not None, "it has columns"
                y = outputs[i][segment.start : segment.end]
                y.addmm_(down[:, columns].to(y.dtype), part.b.to(y.dtype), alpha=part.scale)

    def _stack(self, adapter: Adapter, group: int) -> Stack | None:
        stacks = self._stacks.setdefault(adapter, {})
        if group not in stacks:
            parts = {i: adapter.part(index) for i, index in enumerate(self._groups[group])}
            stacks[group] = _stacked({i: part for i, part in parts.items() if part is not None})
        return stacks[group]


def _stacked(parts: dict[int, Part]) -> Stack | None:
    if not parts:
        return None
    rank = len(next(iter(parts.values())).a)
    columns = {i: slice(nth * rank, (nth + 1) * rank) for nth, i in enumerate(parts)}
    return Stack(torch.cat([part.a_t for part in parts.values()], 1), columns)
