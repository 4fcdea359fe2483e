"""What a model's turn is made of, in order: what it thinks, what it says, and the tools that it calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """`arguments` is a JSON object."""

    name: str
    arguments: str


Event: TypeAlias = Content | Reasoning | Call


def joined(events: Sequence[Event]) -> list[Event]:
    """Neighbours of a kind as one."""
    found: list[Event] = []
    for event in events:
        match found[-1:], event:
            case [Content(before)], Content(text):
                found[-1] = Content(before + text)
            case [Reasoning(before)], Reasoning(text):
                found[-1] = Reasoning(before + text)
            case _:
                found.append(event)
    return found
