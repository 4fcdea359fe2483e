"""Where models of these tests run: in this process alone, or divided among several, by `pytest --ranks 2`."""

import atexit
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import pytest

from lorry.actors.group.leader import Group
from lorry.actors.group.models import divide
from lorry.actors.model.base_model import BaseModel
from lorry.actors.model.in_flight import InFlight
from lorry.actors.model.lora import LoraTargets, attach_lora

chosen_ranks = [1]
"""What --ranks says."""
_placed: WeakKeyDictionary[InFlight, tuple[BaseModel, LoraTargets]] = WeakKeyDictionary()


def placed(base: BaseModel) -> tuple[BaseModel, LoraTargets]:
    """With places for adapters; whoever asks once more for the same base gets the same."""
    if base.in_flight not in _placed:
        targets = attach_lora(base)
        whole = base, targets
        _placed[base.in_flight] = whole if chosen_ranks[0] == 1 else divide(a_group(chosen_ranks[0]), base, targets)
    return _placed[base.in_flight]


def exactly(losses: list[float]) -> Any:
    """Equal to these; among ranks nearly, for what they have of a gradient may have been summed earlier, and so rounded
    otherwise."""
    return losses if chosen_ranks[0] == 1 else pytest.approx(losses, rel=1e-6)


@cache
def a_group(ranks: int) -> Group:
    """One of that size, for all tests of this process."""
    group = Group(ranks, "cpu", 1)
    atexit.register(group.close)
    return group
