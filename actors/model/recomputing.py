"""Activation checkpointing (arXiv:1604.06174), layer by layer: the first layers of a pass may keep their input alone,
and are computed again in its backward. How many, follows from what a pass of such rows holds. Gradients stay the same
to the last bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .in_flight import InFlight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL = 2**31
"""More layers than any model has."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """`token` for each token, and `square` for each pair of tokens of a row, where attention keeps its scores; `block`
    is the most of those that it has at a time, of one row, where it keeps none."""

    token: float
    square: float
    block: float | None = None

    def of(self, lengths: Sequence[int]) -> float:
        """Of rows of so many tokens."""
        scores = [n * n * self.square for n in lengths]
        together = sum(scores) if self.block is None else min(max(scores), self.block)
        return self.token * sum(lengths) + together


@dataclass(frozen=True, slots=True)
class PassCost:
    """Of a training pass: what it holds once it has gone forward, and at most; and both where all of its `layers` are
    computed again."""

    layers: int
    held: Bytes
    most: Bytes
    held_again: Bytes
    most_again: Bytes

    def bytes(self, lengths: Sequence[int], again: int) -> int:
        """At most, of rows of so many tokens, where the first `again` layers are computed again."""
        held, most = self.held.of(lengths), self.most.of(lengths)
        if again == 0:
            return int(most)
        let_go = (held - self.held_again.of(lengths)) * again / self.layers
        return int(max(most - let_go, self.most_again.of(lengths)))

    def layers_again(self, lengths: Sequence[int], available: int) -> int:
        """As few as leave a pass no more than `available` bytes; all, where none leave it so little."""
        return next((n for n in range(self.layers) if self.bytes(lengths, n) <= available), self.layers)

    def longest(self, available: int) -> int:
        """Of a row that fits, with every layer computed again."""
        low, high = 0, 2**30
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes([middle], self.layers) <= available else (low, middle - 1)
        return low


def let_layers_be_computed_again(model: "PreTrainedModel", in_flight: InFlight) -> int:
    """As `in_flight.again` says, in every pass. How many layers there are."""
    layers = decoder_layers(model)
    for place, layer in enumerate(layers):
        layer.forward = _checkpointed(layer, place, in_flight)
    return len(layers)


def decoder_layers(model: "PreTrainedModel") -> list[GradientCheckpointingLayer]:
    """In model order."""
    return [layer for layer in model.get_decoder().modules() if isinstance(layer, GradientCheckpointingLayer)]


def _checkpointed(layer: nn.Module, place: int, in_flight: InFlight) -> Callable[..., Any]:
    forward = layer.forward

    def run(hidden: Tensor, *args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(hidden, *args, **options)
        layers = in_flight.layers
        once = partial(forward, **options) if layers is None else partial(layers.run, place, options)
        if place >= in_flight.again:
            return once(hidden, *args)
        # The other way, without reentering, lets go only of what `save_for_backward` was told.
        return checkpoint(once, hidden, *args, use_reentrant=True, preserve_rng_state=False)

    return run
