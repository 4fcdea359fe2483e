"""What an adapter adds to each of its base's weights, by the names that files have for them. Touches no file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...wire.errors import CheckpointError
from ..adapters.layouts import OF_MODULES, Factors, named, split
from ..model.adapter import Target


@dataclass(frozen=True, slots=True)
class Addend:
    """`a` [rank, inputs] and `b` transposed [rank, outputs]; of all experts with one dimension more in front, of
    `experts` or 1. `transposed` says that the weight itself is [inputs, outputs]."""

    target: str
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False

    def added_to(self, weight: Tensor) -> Tensor:
        """weight [outputs, inputs], or [experts, ...], in whatever dtype -> weight + scale B A, rounded once.

        Raises CheckpointError for one of another shape.
        """
        a, b = (factor.expand(len(weight), -1, -1) if weight.dim() == 3 else factor for factor in (self.a, self.b))
        shape = (*weight.shape[:-2], b.shape[-1], a.shape[-1])
        if (weight.mT if self.transposed else weight).shape != shape:
            raise CheckpointError(f"{self.target} is {list(weight.shape)} in the base's files, expected {list(shape)}")
        if weight.dim() == 2:
            return self._added(weight, a, b)
        return torch.stack([self._added(*each) for each in zip(weight, a, b, strict=True)])

    def _added(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        left, right = (a.mT, b) if self.transposed else (b.mT, a)
        return torch.addmm(weight.float(), left.float(), right.float(), alpha=self.scale).to(weight.dtype)


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
