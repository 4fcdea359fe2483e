"""LoRA of a decode step: one token of many sequences, through the weights of many adapters.

Where `walked` goes from segment to segment, which costs two small products each, this gathers for every row what its
adapter has, as Punica's BGMV does (arXiv:2310.18547), and fills no rank up to another's. It computes no gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...model.adapter import Adapter
from .blocks import RANKS, LoraBlocks, block_count

MOST_SPREAD = 2
"""Every block gets as many places as the adapter of the most rows needs: beyond this many times the places that are
taken, walking from segment to segment costs less."""

MANY_ROWS = 8
"""Of an adapter, on average: from here on walking costs less, too."""


@dataclass(frozen=True, slots=True)
class Routes:
    """Which blocks the rows of a batch go through. A place is one row in one block; an entry is one rank of a row."""

    sources: Tensor  # [blocks * places of each] int64: the row in each place, any where none is
    entries: dict[int, Tensor]  # by modules of a group: [modules * entries] int64 into [places, modules, RANKS]
    index: Tensor  # [entries] int64: each entry's row of B
    offsets: Tensor  # [rows] int64: where each row's entries begin


class Gathered:
    """Of the packed row's first rows, those that `arrange` told of, whose adapters are held.

    `groups` are the indices of layers that read one tensor, in the order in which they do.
    """

    def __init__(self, groups: Sequence[tuple[int, ...]]) -> None:
        self._blocks = LoraBlocks(groups)
        self._widths = {len(group) for group in groups}
        self._routes: Routes | None = None

    def arrange(self, adapters: Sequence[Adapter], counts: Sequence[int], device: torch.device) -> bool:
        """The packed row begins with `counts[i]` rows of `adapters[i]`, at least one each, all different.

        Returns whether gathering is worth it; where it is not, they are to be walked.
        """
        self._routes = None
        blocks = [block_count(adapter) for adapter in adapters]
        taken = sum(own * count for own, count in zip(blocks, counts, strict=True))
        if sum(counts) >= MANY_ROWS * len(adapters) or max(counts) * sum(blocks) > MOST_SPREAD * taken:
            return False
        self._blocks.hold(adapters)
        self._routes = route([self._blocks.of[adapter] for adapter in adapters], counts, self._widths, device)
        return True

    def clear(self) -> None:
        self._blocks.clear()

    def add(self, group: int, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Adds scale (x A.T) B to the outputs of the group's layers, [tokens, outputs] each, in place.

        x [tokens, inputs].
        """
        weights, routes = self._blocks.groups[group], self._routes
        if weights is None or routes is None:
            return
        downs = self._times_a(weights.a[: self._blocks.used], routes, x)  # [modules, entries]
        for y, b, down in zip(outputs, weights.b, downs, strict=True):
            if b.shape[1]:
                y[: len(routes.offsets)] += F.embedding_bag(
                    routes.index, b, routes.offsets, mode="sum", per_sample_weights=down
                )

    def _times_a(self, a: Tensor, routes: Routes, rows: Tensor) -> Tensor:
        """a [blocks, inputs, modules * RANKS], rows [tokens, inputs] -> [modules, entries]."""
        placed = rows.index_select(0, routes.sources).view(len(a), -1, rows.shape[-1])  # [blocks, places, inputs]
        modules = a.shape[-1] // RANKS
        return torch.bmm(placed, a).view(-1).index_select(0, routes.entries[modules]).view(modules, -1)


def route(blocks: Sequence[Sequence[int]], counts: Sequence[int], widths: set[int], device: torch.device) -> Routes:
    """`counts[i]` rows, one behind the other, go through `blocks[i]`; together the blocks are the first ones, and
    `widths` are the sizes of the groups of modules."""
    most = max(counts)
    sources = [0] * (most * sum(map(len, blocks)))
    places, of, offsets = list[int](), list[int](), list[int]()
    for own, count in zip(blocks, counts, strict=True):
        for nth in range(count):
            for block in own:
                sources[block * most + nth] = len(offsets)
            offsets.append(len(of) * RANKS)
            places += [block * most + nth for block in own]
            of += own
    rank = torch.arange(RANKS, device=device)
    place = torch.tensor(places, device=device)[:, None]
    module = {width: torch.arange(width, device=device)[:, None, None] for width in widths}
    return Routes(
        torch.tensor(sources, device=device),
        {width: ((place * width + module[width]) * RANKS + rank).flatten() for width in widths},
        (torch.tensor(of, device=device)[:, None] * RANKS + rank).flatten(),
        torch.tensor(offsets, device=device),
    )
