"""LoRA of a decode step: one token of many sequences, through the weights of many adapters stacked in one tensor.

Where `lora` walks from segment to segment, which costs two small products each, this makes two batched ones of all.
It computes no gradient, and serves only adapters whose weights stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapters import Adapter
from .in_flight import InFlight, LinearLayer
from .lora import LoraLinear, add_lora
from .products import linear

MOST_PADDING_BYTES = 2**25
"""Adapters of all ranks are stacked together, filled up to the largest, where that adds no more than this. Beyond it
each rank has a stack of its own: reading the zeros would cost more than the calls."""

LARGE = 2**18
"""Elements of a weight below which, for a few rows, a call of oneDNN costs more than it gains."""


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., inputs], weight [outputs, inputs], bias [outputs] -> [..., outputs]."""
    return (linear if weight.numel() >= LARGE else F.linear)(x, weight, bias)


class Segmented:
    """The base's product for all tokens, and LoRA for those of the segments in flight, one after the other."""

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight

    def linear(self, module: LinearLayer, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        y = base_product(x, module.weight, module.bias)
        if self._in_flight.segments:
            assert isinstance(module, LoraLinear)
            rows = x.view(-1, module.in_features)  # [tokens, inputs]
            layout = module.layout(len(rows))
            add_lora(layout, rows, y.view(-1, y.shape[-1]))
        return y


class Stacked:
    """As `Segmented`, but that the packed row begins with tokens of adapters that are stacked.

    `groups` are the indices of modules that read one tensor. `hold` says which adapters come, `arrange` how many tokens
    each of them has.
    """

    def __init__(self, groups: Sequence[tuple[int, ...]], in_flight: InFlight) -> None:
        self._segmented = Segmented(in_flight)
        self._groups = groups
        self._place = {module: (g, i) for g, group in enumerate(groups) for i, module in enumerate(group)}
        self._stacks: dict[int, _Stack] = {}  # by the largest rank in it

    def hold(self, adapters: Sequence[Adapter]) -> list[Adapter]:
        """Stacks `adapters`, all different, and no others; returns them in the order that their rows must have."""
        stacks: dict[int, list[Adapter]] = {}
        largest = max((adapter.spec.rank for adapter in adapters), default=0)
        padding = sum((largest - a.spec.rank) * (a.size // a.spec.rank) * a.dtype.itemsize for a in adapters)
        for adapter in adapters:
            stacks.setdefault(adapter.spec.rank if padding > MOST_PADDING_BYTES else largest, []).append(adapter)
        self._stacks = {rank: stack for rank, stack in self._stacks.items() if rank in stacks}
        for rank, members in stacks.items():
            self._stacks.setdefault(rank, _Stack(self._groups, rank)).hold(members)
        return [adapter for stack in self._stacks.values() for adapter in stack.slots]

    def arrange(self, counts: Sequence[int], device: torch.device) -> None:
        """The packed row begins with `counts[i]` tokens of the i-th of the adapters that `hold` returned."""
        row = first = 0
        for stack in self._stacks.values():
            own = counts[first : first + len(stack.slots)]
            stack.arrange(row, own, device)
            row, first = row + sum(own), first + len(own)

    def clear(self) -> None:
        self._stacks = {}

    def forget_input(self) -> None:
        """A step is over."""
        for stack in self._stacks.values():
            stack.last = None

    def linear(self, module: LinearLayer, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        y = self._segmented.linear(module, x)
        rows, out = x.view(-1, module.in_features), y.view(-1, y.shape[-1])  # [tokens, inputs], [tokens, outputs]
        group, i = self._place[module.index]
        for stack in self._stacks.values():
            stack.add(group, i, x, rows, out)
        return y


@dataclass(slots=True)
class _Group:
    """Modules that read one tensor: their A are one, so that they need one product."""

    a: Tensor  # [slots, inputs, modules * rank]
    b: list[Tensor]  # [slots, rank, outputs] of each module, times the adapter's scale


@dataclass(frozen=True, slots=True)
class Spread:
    """Where rows of adapters that have not equally many go, so that each adapter has `per_slot` places."""

    per_slot: int
    sources: Tensor  # [slots * per_slot] int64: the row that each place takes; any row where a place is empty
    places: Tensor  # [rows] int64: each row's place


class _Stack:
    """Adapters in slots, all filled up to one `rank`. It copies an adapter when it comes, and no others."""

    def __init__(self, indices: Sequence[tuple[int, ...]], rank: int) -> None:
        self.slots: list[Adapter] = []
        self.last: tuple[int, Tensor, Tensor] | None = None  # a group, its input and that times A
        self._indices, self._rank = indices, rank
        self._groups: list[_Group | None] = []
        self._capacity = 0
        self._rows = slice(0, 0)
        self._spread: Spread | None = None

    def hold(self, adapters: Sequence[Adapter]) -> None:
        wanted = dict.fromkeys(adapters)
        if len(wanted) > self._capacity:
            self._rebuild(list(wanted))
            return
        for slot in range(len(self.slots) - 1, -1, -1):
            if self.slots[slot] not in wanted:
                self._drop(slot)
        for adapter in wanted:
            if adapter not in self.slots:
                self.slots.append(adapter)
                self._write(len(self.slots) - 1, adapter)

    def arrange(self, start: int, counts: Sequence[int], device: torch.device) -> None:
        """From row `start` on there are `counts[i]` rows of slot i, slot after slot."""
        self._rows = slice(start, start + sum(counts))
        self._spread = None if len(set(counts)) == 1 else spread(counts, device)

    def add(self, group: int, i: int, x: Tensor, rows: Tensor, out: Tensor) -> None:
        """To `out` [tokens, outputs] what module `i` of `group` adds to the stack's rows; `rows` [tokens, inputs] is
        `x`, by whose identity the products of one group are shared."""
        weights = self._groups[group]
        if weights is None:
            return
        slots, rank, out = len(self.slots), self._rank, out[self._rows]
        if self.last is None or self.last[0] != group or self.last[1] is not x:
            self.last = group, x, self._down(weights, rows[self._rows])
        down, b = self.last[2][..., i * rank : (i + 1) * rank], weights.b[i]
        if slots == 1:
            out.addmm_(down, b[0])
        elif self._spread is None:
            out.view(slots, -1, out.shape[-1]).baddbmm_(down, b[:slots])
        else:
            delta = torch.bmm(down, b[:slots]).flatten(0, 1)  # [slots * per_slot, outputs]
            out += delta.index_select(0, self._spread.places)

    def _down(self, weights: _Group, rows: Tensor) -> Tensor:
        """[slots, rows of each, modules * rank], or without the first axis for one slot."""
        slots, spread = len(self.slots), self._spread
        if slots == 1:
            return torch.mm(rows, weights.a[0])
        spaced = rows if spread is None else rows.index_select(0, spread.sources)
        return torch.bmm(spaced.view(slots, -1, rows.shape[-1]), weights.a[:slots])

    def _rebuild(self, adapters: list[Adapter]) -> None:
        self._groups = []  # before the new ones are made, so that both are never in memory
        self.slots, self._capacity = adapters, len(adapters)
        targets = {target.index: target for adapter in adapters for target in adapter.targets}
        device, dtype = adapters[0].device, adapters[0].dtype
        for group in self._indices:
            if not any(module in targets for module in group):
                self._groups.append(None)
                continue
            inputs = next(targets[module].inputs for module in group if module in targets)
            a = torch.zeros(len(adapters), inputs, len(group) * self._rank, dtype=dtype, device=device)
            widths = [targets[module].outputs if module in targets else 0 for module in group]
            b = [torch.zeros(len(adapters), self._rank, width, dtype=dtype, device=device) for width in widths]
            self._groups.append(_Group(a, b))
        for slot, adapter in enumerate(adapters):
            self._write(slot, adapter)

    def _write(self, slot: int, adapter: Adapter) -> None:
        rank = adapter.spec.rank
        for modules, group in zip(self._indices, self._groups, strict=True):
            if group is None:
                continue
            group.a[slot].zero_()
            for i, module in enumerate(modules):
                group.b[i][slot].zero_()
                part = adapter.part(module)
                if part is not None:
                    group.a[slot, :, i * self._rank : i * self._rank + rank] = part.a_t
                    torch.mul(part.b, part.scale, out=group.b[i][slot, :rank])

    def _drop(self, slot: int) -> None:
        """The last slot takes its place."""
        last = self.slots.pop()
        if slot == len(self.slots):
            return
        self.slots[slot] = last
        for group in self._groups:
            if group is not None:
                for tensor in (group.a, *group.b):
                    tensor[slot] = tensor[len(self.slots)]


def spread(counts: Sequence[int], device: torch.device) -> Spread:
    """`counts[i]` rows of slot i stand one behind the other, slot after slot."""
    per_slot = max(counts)
    sources: list[int] = []
    places: list[int] = []
    start = 0
    for slot, count in enumerate(counts):
        sources += [*range(start, start + count), *[0] * (per_slot - count)]
        places += range(slot * per_slot, slot * per_slot + count)
        start += count
    return Spread(per_slot, torch.tensor(sources, device=device), torch.tensor(places, device=device))
