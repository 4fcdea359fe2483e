"""What one rank has of an adapter: of factors that are divided its own slice, and all of those that are not.

Whole vectors are taken apart and put together here, some factors at a time. Knows no commands.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.adapter import Adapter
from ..model.ranks import Ranks
from ..model.shards import own_target
from ..model.spec import AdapterSpec, Target, shapes_of

_ELEMENTS_AT_ONCE = 2**24


@dataclass(frozen=True, slots=True)
class Factor:
    """Of one target, A or B transposed: its whole `shape`, and what of it along `dim` is this rank's and no other's, or
    all of it, which every rank has."""

    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    size: int | None = None

    @property
    def is_common(self) -> bool:
        return self.size is None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def own_elements(self) -> int:
        return self.elements if self.size is None else self.elements // self.shape[self.dim] * self.size

    def of(self, whole: Tensor) -> Tensor:
        """Own elements, as a view of all [elements]."""
        whole = whole.view(self.shape)
        return whole if self.size is None else whole.narrow(self.dim, self.start, self.size)


def factors_of(spec: AdapterSpec, target: Target) -> tuple[Factor, Factor]:
    shapes, shard = shapes_of(spec, target), target.shard
    a, b = (Factor(shape) for shape in shapes)
    if shard is None or shard.is_shared:
        return a, b
    size = shard.end - shard.start
    if shard.axis == "experts":
        common = target.expert_weight.common if target.expert_weight and spec.expert_lora == "shared" else None
        own_a, own_b = (Factor(shape, 0, shard.start, size) for shape in shapes)
        return (a if common == "a" else own_a), (b if common == "b" else own_b)
    if shard.axis == "inputs":
        return Factor(a.shape, len(a.shape) - 1, shard.start, size), b
    return a, Factor(b.shape, len(b.shape) - 1, shard.start, size)


class RankAdapter(Adapter):
    """This rank's part of an adapter on `targets`, which know what of each layer is its own. `size` is the whole's."""

    def __init__(
        self, spec: AdapterSpec, targets: Sequence[Target], ranks: Ranks, *, dtype: torch.dtype, trainable: bool
    ) -> None:
        self._ranks = ranks
        self.factors = [factor for target in targets for factor in factors_of(spec, target)]
        weights = torch.zeros(sum(factor.own_elements for factor in self.factors), device=ranks.device)
        own = [own_target(target) for target in targets]
        super().__init__(spec, own, dtype=dtype, device=ranks.device, trainable=trainable, weights=weights)
        self._whole = sum(factor.elements for factor in self.factors)

    @property
    def size(self) -> int:
        return self._whole

    def pieces(self, own: Tensor) -> Sequence[Tensor]:
        """Of a vector of this rank's, each factor's."""
        return own.split_with_sizes([factor.own_elements for factor in self.factors])

    @property
    def marked_gradient(self) -> Tensor:
        assert self._marked is not None and self._marked[1] is not None
        return self._marked[1]

    def clear_common(self, own: Tensor) -> None:
        for factor, piece in zip(self.factors, self.pieces(own), strict=True):
            if factor.is_common:
                piece.zero_()

    def take(self, own: Tensor, whole: Tensor | None) -> None:
        """On every rank, together: `own` becomes this rank's part of the first rank's `whole` [P]."""
        pieces = iter(self.pieces(own))
        for start, end, factors in self._chunks():
            chunk = torch.empty(end - start, device=own.device) if whole is None else whole[start:end].to(own.device)
            self._ranks.from_first(chunk)
            for factor, piece in zip(factors, chunk.split_with_sizes([f.elements for f in factors]), strict=True):
                next(pieces).copy_(factor.of(piece).reshape(-1))

    def put_together(self, own: Tensor, *, is_summed: bool) -> Tensor:
        """On every rank, together: the whole [P] on the first one's host, of every rank's own. What all ranks have is
        the sum of what they have of it, or the first one's."""
        whole = torch.empty(self.size if self._ranks.rank == 0 else 0)
        pieces = iter(self.pieces(own))
        for start, end, factors in self._chunks():
            chunk = torch.zeros(end - start, device=own.device)
            for factor, to in zip(factors, chunk.split_with_sizes([f.elements for f in factors]), strict=True):
                piece, place = next(pieces), factor.of(to)
                if is_summed or not factor.is_common or self._ranks.rank == 0:
                    place.copy_(piece.view(place.shape))
            self._ranks.sum_into_first(chunk)
            if self._ranks.rank == 0:
                whole[start:end] = chunk.cpu()
        return whole

    def _chunks(self) -> Iterator[tuple[int, int, list[Factor]]]:
        """From and to where in whole vectors, and the factors there: the same on every rank."""
        start = end = 0
        factors: list[Factor] = []
        for factor in self.factors:
            if factors and end - start + factor.elements > _ELEMENTS_AT_ONCE:
                yield start, end, factors
                start, factors = end, []
            factors.append(factor)
            end += factor.elements
        yield start, end, factors


class AcrossRanks:
    """What a step of Adam needs to know of the other ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def gradients(self, adapters: Sequence[Adapter]) -> tuple[list[Tensor], list[float]]:
        """Copies, with what is common summed over the ranks; and the norms of the whole."""
        grads, own, common = list[Tensor](), list[Tensor](), list[Tensor]()
        for adapter in adapters:
            assert isinstance(adapter, RankAdapter)
            grad = adapter.grad.clone()
            views = [p for f, p in zip(adapter.factors, adapter.pieces(grad), strict=True) if f.is_common]
            together = self._ranks.sum_(torch.cat(views) if views else grad.new_empty(0))
            for view in views:
                view.zero_()  # what is left is no other rank's
            own.append(_square(grad))
            common.append(_square(together))
            for view, summed in zip(views, together.split_with_sizes([*map(Tensor.numel, views)]), strict=True):
                view.copy_(summed)
            grads.append(grad)
        return grads, (self._ranks.sum_(torch.stack(own)) + torch.stack(common)).sqrt().tolist()

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Whether all ranks say so, of each."""
        against = torch.tensor([not flag for flag in flags], dtype=torch.float32, device=self._ranks.device)
        return [not other for other in self._ranks.sum_(against).tolist()]


def _square(vector: Tensor) -> Tensor:
    """Of its norm: float64 holds that of any float32."""
    return torch.linalg.vector_norm(vector, dtype=torch.float64).square()
