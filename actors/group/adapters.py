"""The first rank's adapters, which go to the ranks when they are used, and come home when somebody wants them whole."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TypeVar, cast
from weakref import finalize

import msgspec
import torch
from torch import Tensor

from ...wire.types import AdamParams
from ..model.adapter import Adapter, Part, TrainingState
from ..model.in_flight import Segment
from ..model.leading import Stretch
from ..model.ranks import Ranks
from ..model.spec import AdapterSpec, Target
from ..training.adam import adam_step, all_finite, groups
from .leader import Group
from .messages import AdamStep, AllFinite, Change, Command, Drop, Fetch, How, Send, Vector
from .parts import AcrossRanks, RankAdapter

T = TypeVar("T")


class Leader:
    """A `Lead`, of one base model that the group shares."""

    def __init__(self, group: Group, model: int) -> None:
        self._group, self._model = group, model
        self._parts: dict[int, RankAdapter] = {}  # this rank's
        self._lost: list[int] = []  # whose adapter is at home again, or nobody's any more
        self._to_come = count()

    @property
    def ranks(self) -> Ranks:
        return self._group.ranks

    def run(self, command: msgspec.Struct, mine: Callable[[], T]) -> T:
        return self._group.run(self._model, cast(Command, command), mine)

    def numbers_of(self, segments: Sequence[Segment], *, train: bool = False) -> list[Stretch]:
        numbers = self._send(dict.fromkeys(segment.adapter for segment in segments))
        for number in numbers.values() if train else ():
            self._parts[number].pending = True
        return [Stretch(numbers[segment.adapter], segment.start, segment.end) for segment in segments]

    def all_finite(self, adapters: Sequence[Adapter]) -> list[bool]:
        numbers = list(self._send(dict.fromkeys(adapters)).values())
        return self.run(AllFinite(numbers), lambda: finite_everywhere([self._parts[n] for n in numbers], self.ranks))

    def adam_step(self, adapters: Sequence[Adapter], params: Sequence[AdamParams]) -> Iterator[float | None]:
        for chosen in groups(adapters):
            stepped, theirs = adapters[chosen], list(params[chosen])
            numbers = list(self._send(dict.fromkeys(stepped)).values())
            parts = [self._parts[number] for number in numbers]
            norms = self.run(AdamStep(numbers, theirs), lambda p=parts, t=theirs: step_together(p, t, self.ranks))
            for adapter, norm in zip(stepped, norms, strict=True):
                adapter.step += norm is not None
                adapter.pending = False
            yield from norms

    def fetch(self, number: int, vectors: Sequence[Vector]) -> list[Tensor]:
        """Whole, on the host."""
        part = self._parts[number]
        return self.run(Fetch(number, list(vectors)), lambda: [put_together(part, vector) for vector in vectors])

    def change(self, number: int, how: How) -> None:
        self.run(Change(number, how), getattr(self._parts[number], how))

    def part(self, number: int, index: int) -> Part | None:
        return self._parts[number].part(index)

    def _send(self, adapters: dict[Adapter, None]) -> dict[Adapter, int]:
        self._drop()
        return {adapter: self._number_of(adapter) for adapter in adapters}

    def _number_of(self, adapter: Adapter) -> int:
        if isinstance(away := adapter.away, AwayAdapter):
            return away.number
        number = next(self._to_come)
        command = Send(
            adapter=number,
            rank=adapter.spec.rank,
            alpha=adapter.spec.alpha,
            expert_lora=adapter.spec.expert_lora,
            targets=[target.index for target in adapter.targets],
            trainable=adapter.trainable,
            step=adapter.step,
            pending=adapter.pending,
        )
        try:
            self._parts[number] = self.run(
                command, lambda: received(command, adapter.targets, self.ranks, adapter.dtype, adapter)
            )
        except BaseException:
            self._lost.append(number)  # some may have it
            raise
        away = AwayAdapter(self, number, trainable=adapter.trainable)
        finalize(away, self._lost.append, number)
        adapter.leave(away)
        return number

    def _drop(self) -> None:
        lost: list[int] = []
        while self._lost:
            lost.append(self._lost.pop())
            self._parts.pop(lost[-1], None)
        if lost:
            try:
                self.run(Drop(lost), lambda: None)
            except BaseException:
                self._lost += lost
                raise


class AwayAdapter:
    """An `Away`. Whoever lets go of it has the adapter at home, or does not want it any more."""

    def __init__(self, leader: Leader, number: int, *, trainable: bool) -> None:
        self.number = number
        self._leader, self._trainable = leader, trainable

    @property
    def device(self) -> torch.device:
        return self._leader.ranks.device

    def part(self, index: int) -> Part | None:
        return self._leader.part(self.number, index)

    def weights(self) -> Tensor:
        return self._leader.fetch(self.number, ["weights"])[0]

    def state(self, *, pending: bool) -> TrainingState:
        if not self._trainable:
            return TrainingState(self.weights(), None, None, None, 0)
        vectors: list[Vector] = ["weights", "exp_avg", "exp_avg_sq", *(["grad"] if pending else [])]
        weights, exp_avg, exp_avg_sq, *grad = self._leader.fetch(self.number, vectors)
        return TrainingState(weights, exp_avg, exp_avg_sq, grad[0] if grad else None, 0)

    def marked(self) -> Tensor:
        return self._leader.fetch(self.number, ["marked"])[0]

    def mark(self) -> None:
        self._leader.change(self.number, "mark")

    def rollback(self) -> None:
        self._leader.change(self.number, "rollback")

    def commit(self) -> None:
        self._leader.change(self.number, "commit")

    def discard(self) -> None:
        self._leader.change(self.number, "discard")


# What every rank does, together ------------------------------------------------------------------------------------


def received(
    command: Send, targets: Sequence[Target], ranks: Ranks, dtype: torch.dtype, whole: Adapter | None
) -> RankAdapter:
    """This rank's part of an adapter, whose vectors the first rank has: the `whole`."""
    spec = AdapterSpec(command.rank, command.alpha, expert_lora=command.expert_lora)
    part = RankAdapter(spec, targets, ranks, dtype=dtype, trainable=command.trainable)
    names = ["weights", *(["exp_avg", "exp_avg_sq"] if command.step else []), *(["grad"] if command.pending else [])]
    for name in names:
        part.take(getattr(part, name), None if whole is None else getattr(whole, name))
    if command.pending and ranks.rank > 0:
        part.clear_common(part.grad)  # which is the sum of what the ranks have
    part.step, part.pending = command.step, command.pending
    part.refresh()
    return part


def put_together(part: RankAdapter, vector: Vector) -> Tensor:
    if vector == "marked":
        return part.put_together(part.marked_gradient, is_summed=True)
    return part.put_together(getattr(part, vector), is_summed=vector == "grad")


def finite_everywhere(parts: Sequence[RankAdapter], ranks: Ranks) -> list[bool]:
    return AcrossRanks(ranks).agree(all_finite([part.grad for part in parts]))


def step_together(parts: Sequence[RankAdapter], params: Sequence[AdamParams], ranks: Ranks) -> list[float | None]:
    return list(adam_step(parts, params, AcrossRanks(ranks)))
