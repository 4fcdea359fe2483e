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

MOST_PADDING = 2
"""How many times the adapters' own memory the stack may take, since all are filled up to the largest rank."""


@dataclass(slots=True)
class _Group:
    """Modules that read one tensor: their A are one, so that they need one product."""

    a: Tensor  # [slots, modules * rank, inputs]
    b: list[Tensor]  # [slots, rank, outputs] of each module, times the adapter's scale


@dataclass(frozen=True, slots=True)
class Spread:
    """Where rows of adapters that have not equally many go, so that each adapter has `per_slot` places."""

    per_slot: int
    sources: Tensor  # [slots * per_slot] int64: the row that each place takes; any row where a place is empty
    places: Tensor  # [rows] int64: each row's place


class LoraStack:
    """The weights of adapters that decode together, in slots. It copies an adapter when it comes, and no others.

    `groups` are the indices of modules that read one tensor. Fill `slots` with `hold`, then `arrange` the rows.
    """

    def __init__(self, groups: Sequence[tuple[int, ...]], in_flight: InFlight) -> None:
        self.slots: list[Adapter] = []
        self._in_flight = in_flight
        self._indices = groups
        self._place = {module: (g, i) for g, group in enumerate(groups) for i, module in enumerate(group)}
        self._groups: list[_Group | None] = []
        self._rank = 0
        self._capacity = 0
        self._rows = 0
        self._spread: Spread | None = None
        self._last: tuple[int, Tensor, Tensor] | None = None  # group, its input and that times A

    def hold(self, adapters: Sequence[Adapter]) -> bool:
        """Makes `adapters`, all different, the contents of the slots, in an order of its own. False where they do not
        pay in the memory they take: then nothing is held."""
        wanted = dict.fromkeys(adapters)
        if not wanted or not self._pays(list(wanted)):
            self.clear()
            return False
        if len(wanted) > self._capacity or max(adapter.spec.rank for adapter in wanted) > self._rank:
            self._rebuild(list(wanted))
            return True
        for slot in range(len(self.slots) - 1, -1, -1):
            if self.slots[slot] not in wanted:
                self._drop(slot)
        for adapter in wanted:
            if adapter not in self.slots:
                self.slots.append(adapter)
                self._write(len(self.slots) - 1, adapter)
        return True

    def clear(self) -> None:
        self.slots, self._groups, self._rank, self._capacity, self._last = [], [], 0, 0, None

    def arrange(self, counts: Sequence[int], device: torch.device) -> None:
        """The packed row begins with `counts[i]` tokens of slot i, slot after slot."""
        self._rows = sum(counts)
        self._spread = None if len(set(counts)) == 1 else spread(counts, device)

    def forget_input(self) -> None:
        """A step is over."""
        self._last = None

    def linear(self, module: LinearLayer, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]: the base's product, the stack's for the first rows, and those of the
        segments in flight for the others."""
        y = F.linear(x, module.weight, module.bias)
        rows, out = x.view(-1, module.in_features), y.view(-1, y.shape[-1])  # [tokens, inputs], [tokens, outputs]
        group, i = self._place[module.index]
        weights = self._groups[group]
        if weights is not None:
            self._add(group, weights, i, x, rows[: self._rows], out[: self._rows])
        if self._in_flight.segments:
            assert isinstance(module, LoraLinear)
            layout = module.layout(len(rows))
            if layout is not None:
                add_lora(layout, rows, out)
        return y

    def _add(self, group: int, weights: _Group, i: int, x: Tensor, rows: Tensor, out: Tensor) -> None:
        slots, rank, spread = len(self.slots), self._rank, self._spread
        if self._last is None or self._last[0] != group or self._last[1] is not x:
            self._last = group, x, self._down(weights, rows)
        down = self._last[2][..., i * rank : (i + 1) * rank]
        b = weights.b[i][:slots]
        if slots == 1:
            out.addmm_(down, b[0])
        elif spread is None:
            out.view(slots, -1, out.shape[-1]).baddbmm_(down, b)
        else:
            delta = torch.bmm(down, b).flatten(0, 1)  # [slots * per_slot, outputs]
            out += delta.index_select(0, spread.places)

    def _down(self, weights: _Group, rows: Tensor) -> Tensor:
        """[slots, rows of each, modules * rank], or without the first axis for one slot."""
        slots, spread = len(self.slots), self._spread
        if slots == 1:
            return torch.mm(rows, weights.a[0].T)
        spaced = rows if spread is None else rows.index_select(0, spread.sources)
        return torch.bmm(spaced.view(slots, -1, rows.shape[-1]), weights.a[:slots].mT)

    def _pays(self, adapters: Sequence[Adapter]) -> bool:
        largest = max(adapter.spec.rank for adapter in adapters)
        per_rank = sum({t.index: t.inputs + t.outputs for a in adapters for t in a.targets}.values())
        return len(adapters) * largest * per_rank <= MOST_PADDING * sum(adapter.size for adapter in adapters)

    def _rebuild(self, adapters: list[Adapter]) -> None:
        self.clear()  # before the new one is made, so that both are never in memory
        self.slots, self._capacity = adapters, len(adapters)
        self._rank = max(adapter.spec.rank for adapter in adapters)
        targets = {target.index: target for adapter in adapters for target in adapter.targets}
        device, dtype = adapters[0].device, adapters[0].dtype
        for group in self._indices:
            if not any(module in targets for module in group):
                self._groups.append(None)
                continue
            inputs = next(targets[module].inputs for module in group if module in targets)
            a = torch.zeros(len(adapters), len(group) * self._rank, inputs, dtype=dtype, device=device)
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
                    group.a[slot, i * self._rank : i * self._rank + rank] = part.a
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
