"""Which tokens go to which experts, and whose tokens they are. Knows no weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring pairs of one expert and one segment's tokens; of nobody's tokens where `segment` is None."""

    segment: int | None
    pairs: int


@dataclass(frozen=True, slots=True)
class Routing:
    """The pairs of a token and an expert that it chose: by expert, within an expert by segment, and then by token.

    `counts` are the pairs of each expert, which its `stretches` share from the first pair to the last.
    """

    tokens: Tensor  # [pairs] int64: whose pair it is
    experts: Tensor  # [pairs] int64
    order: Tensor  # [pairs] int64: each pair's place among the tokens' choices
    places: Tensor  # [tokens, choices] int64: the place of each choice among the pairs
    choices: int
    counts: list[int]  # [experts]
    stretches: list[list[Stretch]]  # [experts]

    def sum(self, pairs: Tensor, counted: Tensor | None = None) -> Tensor:
        """[pairs, width], each counted once or as much as `counted` [tokens, choices] says -> [tokens, width]."""
        weights = None if counted is None else counted.to(pairs.dtype)
        return F.embedding_bag(self.places, pairs, mode="sum", per_sample_weights=weights)

    def of_choices(self, pairs: Tensor) -> Tensor:
        """[pairs] -> [tokens, choices]."""
        return pairs[self.places]

    def split(self, pairs: Tensor) -> Sequence[Tensor]:
        """[pairs, width] by stretches, as views."""
        return pairs.split_with_sizes([stretch.pairs for own in self.stretches for stretch in own])

    def gather(self, rows: Tensor) -> Tensor:
        """[tokens, width] -> each pair's, [pairs, width]."""
        return rows.index_select(0, self.tokens)


@dataclass(frozen=True, slots=True)
class PartialRouting(Routing):
    """Of some experts' pairs alone, the experts counted from the first of these. `places` are the pairs' by token,
    [pairs], and each token's begin at `starts`."""

    starts: Tensor  # [tokens] int64

    def sum(self, pairs: Tensor, counted: Tensor | None = None) -> Tensor:
        if not len(pairs):
            return pairs.new_zeros(len(self.starts), pairs.shape[1])
        weights = None if counted is None else counted.reshape(-1)[self.order[self.places]].to(pairs.dtype)
        return F.embedding_bag(self.places, pairs, self.starts, mode="sum", per_sample_weights=weights)

    def of_choices(self, pairs: Tensor) -> Tensor:
        """Zero where a token chose another expert."""
        tokens, choices = len(self.starts), self.choices
        return pairs.new_zeros(tokens * choices).index_copy_(0, self.order, pairs).view(tokens, choices)


def route(
    chosen: Tensor, experts: int, segments: Sequence[tuple[int, int]], own: tuple[int, int] | None = None
) -> Routing:
    """chosen [tokens, choices] int64 are the different experts of every token; `segments` are the first token of each
    and the one behind its last, in order. Of all `experts`, or of the `own` alone, from the first to the last but one.
    """
    tokens, choices = chosen.shape
    width = len(segments) + 1
    keys = (chosen * width + _owners(tokens, segments).to(chosen.device)[:, None]).view(-1)
    order = keys.argsort(stable=True)
    first, last = own or (0, experts)
    table = _counted(keys, experts, width, first, last)
    counts = [sum(row) for row in table]
    before, counts, table = sum(counts[:first]), counts[first:last], table[first:last]
    order = order[before : before + sum(counts)]
    common: dict[str, Any] = {
        "tokens": order.div(choices, rounding_mode="floor"),
        "experts": chosen.reshape(-1)[order] - first,
        "order": order,
        "choices": choices,
        "counts": counts,
        "stretches": [
            [Stretch(segment if segment < len(segments) else None, pairs) for segment, pairs in enumerate(row) if pairs]
            for row in table
        ],
    }
    if own is None:
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        return Routing(**common, places=places.view(tokens, choices))
    places = order.argsort()
    firsts = torch.arange(0, tokens * choices, choices, device=order.device)
    return PartialRouting(**common, places=places, starts=torch.searchsorted(order[places], firsts))


def _counted(keys: Tensor, experts: int, width: int, first: int, last: int) -> list[list[int]]:
    """[experts, width]. On the meta device, where nobody chooses, as if the first segment chose the `first` expert for
    all of those up to the `last`: it is the pairs that take memory, whoever has them."""
    if keys.is_meta:
        table = [[0] * width for _ in range(experts)]
        if first < last:
            table[first][0] = -(-len(keys) * (last - first) // experts)
        return table
    return torch.bincount(keys, minlength=experts * width).view(experts, width).tolist()


def _owners(tokens: int, segments: Sequence[tuple[int, int]]) -> Tensor:
    """[tokens] int64: the number of each token's segment; those of none come last."""
    owners = [len(segments)] * tokens  # a list, since there may be a segment for each token, in every layer
    for i, (start, end) in enumerate(segments):
        owners[start:end] = [i] * (end - start)
    return torch.tensor(owners)
