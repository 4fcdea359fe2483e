"""What an adapter adds to each of its base's weights, by the names that files have for them. Touches no file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...wire.errors import CheckpointError
from ..adapters.layouts import OF_MODULES, Factors, named, split
from ..model.spec import Target


@dataclass(frozen=True, slots=True)
class Addend:
    """`a` [rank, inputs] and `b` transposed [rank, outputs]; of all experts with one dimension more in front, of
    `experts` or 1. `transposed` says that the weight itself is [inputs, outputs]."""

    target: str
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        experts = (max(len(self.a), len(self.b)),) if self.a.dim() == 3 else ()
        matrix = self.b.shape[-1], self.a.shape[-1]
        return (*experts, *(reversed(matrix) if self.transposed else matrix))

    def added_to(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """weight [outputs, inputs], or [experts, ...] -> weight + scale B A in `dtype`, rounded once.

        Raises CheckpointError for one of another shape.
        """
        if weight.shape != self.shape:
            found, expected = list(weight.shape), list(self.shape)
            raise CheckpointError(f"{self.target} is {found} in the base's files, expected {expected}")
        if weight.dim() == 2:
            return self._added(weight, self.a, self.b).to(dtype)
        merged = torch.empty_like(weight, dtype=dtype)
        a, b = (factor.expand(len(weight), -1, -1) for factor in (self.a, self.b))
        for each in zip(merged, weight, a, b, strict=True):
            each[0].copy_(self._added(*each[1:]))
        return merged

    def _added(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        left, right = (a.mT, b) if self.transposed else (b.mT, a)
        return torch.addmm(weight.float(), left, right, alpha=self.scale)


class Addends:
    """By names of weights. Experts' weights are in one, or there is one for each and for gate and up apart."""

    def __init__(self, targets: Sequence[Target], factors: Mapping[str, Factors], scale: float) -> None:
        self._ways = {target.name: _ways(target, factors[target.name], scale) for target in targets}
        self._each = {name: addend for ways in self._ways.values() for way in ways for name, addend in way.items()}
        self._found: set[str] = set()

    def find(self, name: str) -> Addend | None:
        addend = self._each.get(name)
        if addend is not None:
            self._found.add(name)
        return addend

    def missing(self) -> list[str]:
        """The targets whose weights have not all been found."""
        return [target for target, ways in self._ways.items() if not any(way.keys() <= self._found for way in ways)]


def _ways(target: Target, factors: Factors, scale: float) -> list[dict[str, Addend]]:
    """Names and addends of each way in which files may have a target's weights."""
    a, b = factors
    if (weight := target.expert_weight) is None:
        return [{f"{target.name}.weight": Addend(target.name, a, b, scale)}]
    names = named(target, OF_MODULES)
    apart: dict[str, Addend] = {}
    for name, piece in zip(names, split(b, len(names), weight.interleaved), strict=True):
        mixture, _, leaf = name.rpartition(".")
        for i in range(weight.count):
            own = Addend(target.name, a[i if len(a) > 1 else 0], piece[i if len(piece) > 1 else 0], scale)
            apart[f"{mixture}.{i}.{leaf}.weight"] = own
    return [{target.name: Addend(target.name, a, b, scale, weight.transposed)}, apart]
