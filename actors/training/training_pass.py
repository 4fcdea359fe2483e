"""One training pass: a packed row of many adapters' tokens through the model, its losses, and back.

It puts in flight what the model reads and takes it away again, whatever happens. It decides nothing.
"""

from dataclasses import dataclass
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from ...wire.types import TensorData
from ..images.layout import Seen
from ..model.base_model import BaseModel
from ..model.in_flight import Segment
from ..model.leading import Division, SeenHead, Stretch, packed, seen_head, share_seen
from ..model.lora import LoraTargets, head_of
from .divided_head import DividedHead
from .logprobs import OutputHead, Scores, Targets


class Losses(Protocol):
    """Of the targets of one pass."""

    @property
    def need_logprobs(self) -> bool:
        """Whether some look at whole sequences, and so at the logprobs of all targets first."""
        ...

    def given(self, logprobs: Tensor) -> "Losses":
        """That look at logprobs [targets] float32."""
        ...

    def evaluate(self, start: int, end: int, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and d loss / d logprob of targets `start` to `end`, [end - start] float32."""
        ...


@dataclass(frozen=True, slots=True)
class PassInput:
    """A packed row of sequences of `lengths`, of which `again` layers are computed again in the backward."""

    tokens: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] or, with images, [3, tokens] int64
    lengths: list[int]
    segments: list[Segment]
    targets: Targets
    seen: Seen | None
    backward: bool
    again: int


class TrainingPass:
    def __init__(self, base: BaseModel, targets: LoraTargets, logits_bytes: int) -> None:
        self._base, self._division = base, base.division
        if base.division is None:
            self._head = OutputHead(head_of(base), targets, logits_bytes)
        else:
            self._head = DividedHead(head_of(base), targets, logits_bytes, base.division.ranks)
        if base.lead is not None:
            base.lead.run(BeginTraining(logits_bytes), lambda: None)

    def run(self, row: PassInput, losses: Losses) -> Scores:
        """With `row.backward` the gradients of the adapters are added in place. Where several devices share the model,
        each adds what its part of the layers gives."""
        division = self._division
        if division is None or division.lead is None:
            return self.run_here(row, losses)
        stretches = division.lead.numbers_of(row.segments, train=row.backward)
        command = _told(row, stretches, losses, self._base.in_flight.beside_others)
        return division.lead.run(command, lambda: self.run_here(row, _Shared(losses, division, row.backward)))

    def run_here(self, row: PassInput, losses: Losses) -> Scores:
        """On every rank, together."""
        in_flight, seen = self._base.in_flight, row.seen
        if seen is not None and self._division is not None:
            seen = share_seen(seen, self._division.ranks, self._base.dtype)
        in_flight.again = row.again
        in_flight.lengths, in_flight.segments = row.lengths, row.segments
        try:
            hidden = self._base.hidden_states(row.tokens, row.positions, grad=row.backward, seen=seen)
            if losses.need_logprobs:
                losses = losses.given(self._head.logprobs(hidden.detach(), row.targets))
            scores = self._head.score(hidden.detach(), row.targets, losses.evaluate, backward=row.backward)
            if scores.d_hidden is not None:
                hidden.backward(scores.d_hidden)
            return scores
        finally:
            in_flight.lengths, in_flight.segments, in_flight.again = [], [], 0
            if in_flight.layers is not None:
                in_flight.layers.let_go()


class BeginTraining(msgspec.Struct, frozen=True, tag=True):
    """Passes will come, whose heads have so many bytes for logits."""

    logits_bytes: int


class Train(msgspec.Struct, frozen=True, tag=True):
    """A PassInput as it travels. What was seen of images follows, and the gradient of each chunk's logprobs."""

    tokens: TensorData
    positions: TensorData
    lengths: list[int]
    segments: list[Stretch]
    targets: TensorData
    target_rows: TensorData
    target_starts: TensorData
    seen: SeenHead | None
    backward: bool
    again: int
    need_logprobs: bool
    beside_others: bool


def _told(row: PassInput, segments: list[Stretch], losses: Losses, beside_others: bool) -> Train:
    return Train(
        tokens=packed(row.tokens),
        positions=packed(row.positions),
        lengths=row.lengths,
        segments=segments,
        targets=packed(row.targets.tokens),
        target_rows=packed(row.targets.rows),
        target_starts=packed(row.targets.starts),
        seen=seen_head(row.seen),
        backward=row.backward,
        again=row.again,
        need_logprobs=losses.need_logprobs,
        beside_others=beside_others,
    )


@dataclass(frozen=True, slots=True)
class _Shared:
    """The first rank knows the losses, and tells the others their gradients."""

    losses: Losses
    division: Division
    backward: bool

    @property
    def need_logprobs(self) -> bool:
        return self.losses.need_logprobs

    def given(self, logprobs: Tensor) -> Losses:
        return _Shared(self.losses.given(logprobs), self.division, self.backward)

    def evaluate(self, start: int, end: int, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        losses, grads = self.losses.evaluate(start, end, logprobs)
        if self.backward:
            self.division.ranks.from_first(grads)
        return losses, grads


@dataclass(frozen=True, slots=True)
class Heard:
    """What the other ranks have in place of losses."""

    need_logprobs: bool
    division: Division
    backward: bool

    def given(self, logprobs: Tensor) -> "Heard":
        return self

    def evaluate(self, start: int, end: int, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        grads = torch.empty_like(logprobs)
        if self.backward:
            self.division.ranks.from_first(grads)
        return torch.zeros_like(logprobs), grads
