"""The weights of the adapters of a decode step, in blocks of a few ranks: what one rank more costs is a few rows.

It copies an adapter when it comes and knows no tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...model.adapter import Adapter

RANKS = 8
"""Ranks in a block; an adapter's last block is filled up with zeros."""


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """Of modules that read one tensor, so that one product with A serves all of them. A module that no adapter has is
    0 outputs wide."""

    a: Tensor  # [blocks, inputs, modules * RANKS]
    b: list[Tensor]  # each module's [blocks * RANKS, outputs], times the adapter's scale


class LoraBlocks:
    """`of` names the blocks of every adapter held, and together they are the first `used` ones. `groups` are in the
    order of the indices that they are made of, None where no adapter has any of the modules."""

    def __init__(self, indices: Sequence[tuple[int, ...]]) -> None:
        self.of: dict[Adapter, list[int]] = {}
        self.groups: list[GroupWeights | None] = []
        self.used = 0
        self._indices = indices
        self._capacity = 0
        self._modules: set[int] = set()  # those that there is memory for

    def hold(self, adapters: Sequence[Adapter]) -> None:
        """These, all different, and no others. Their weights must not change while they are held."""
        modules = {target.index for adapter in adapters for target in adapter.targets}
        if sum(map(block_count, adapters)) > self._capacity or not modules <= self._modules:
            self._rebuild(adapters)
            return
        for adapter in [adapter for adapter in self.of if adapter not in adapters]:
            self._drop(adapter)
        for adapter in adapters:
            if adapter not in self.of:
                self._add(adapter)

    def clear(self) -> None:
        self.of, self.groups = {}, []
        self.used = self._capacity = 0

    def _rebuild(self, adapters: Sequence[Adapter]) -> None:
        self.clear()  # before new tensors are made, so that old and new are never in memory together
        self._capacity = sum(map(block_count, adapters))
        targets = {target.index: target for adapter in adapters for target in adapter.targets}
        self._modules = set(targets)
        device, dtype = adapters[0].device, adapters[0].dtype
        for modules in self._indices:
            known = [targets[module] for module in modules if module in targets]
            if not known:
                self.groups.append(None)
                continue
            widths = [targets[module].own_sizes[1] if module in targets else 0 for module in modules]
            a = _empty_a(self._capacity, known[0].own_sizes[0], len(modules), dtype, device)
            b = [torch.empty(self._capacity * RANKS, width, dtype=dtype, device=device) for width in widths]
            self.groups.append(GroupWeights(a, b))
        for adapter in adapters:
            self._add(adapter)

    def _add(self, adapter: Adapter) -> None:
        first, blocks = self.used, block_count(adapter)
        self.of[adapter] = list(range(first, first + blocks))
        self.used += blocks
        filling = blocks * RANKS - adapter.spec.rank
        for modules, group in zip(self._indices, self.groups, strict=True):
            if group is None:
                continue
            a = group.a[first : self.used].unflatten(-1, (len(modules), RANKS))  # [blocks, inputs, modules, RANKS]
            for i, module in enumerate(modules):
                part, b = adapter.part(module), group.b[i][first * RANKS : self.used * RANKS]
                if part is None:
                    a[:, :, i] = 0
                    b.zero_()
                else:
                    own = F.pad(part.a_t, (0, filling)) if filling else part.a_t  # [inputs, blocks * RANKS]
                    a[:, :, i] = own.unflatten(-1, (blocks, RANKS)).transpose(0, 1)
                    torch.mul(part.b, part.scale, out=b[: len(part.b)])
                    b[len(part.b) :].zero_()

    def _drop(self, adapter: Adapter) -> None:
        """The last blocks move into the places of its own."""
        for hole in sorted(self.of.pop(adapter), reverse=True):
            self.used -= 1
            if hole != self.used:
                self._move(self.used, hole)

    def _move(self, block: int, hole: int) -> None:
        owner = next(blocks for blocks in self.of.values() if block in blocks)
        owner[owner.index(block)] = hole
        for group in self.groups:
            if group is not None:
                group.a[hole] = group.a[block]
                for b in group.b:
                    b[hole * RANKS : (hole + 1) * RANKS] = b[block * RANKS : (block + 1) * RANKS]


def _empty_a(blocks: int, inputs: int, modules: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[blocks, inputs, modules * RANKS]; in memory inputs come last where there are few others, which reads faster."""
    if modules == 1:
        return torch.empty(blocks, RANKS, inputs, dtype=dtype, device=device).mT
    return torch.empty(blocks, inputs, modules * RANKS, dtype=dtype, device=device)


def block_count(adapter: Adapter) -> int:
    """How many blocks it takes."""
    return -(-adapter.spec.rank // RANKS)
