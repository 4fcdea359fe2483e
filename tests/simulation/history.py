"""What happened, as everybody outside the broker saw it: all that the checker has to go by."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    at: float
    what: str
    facts: dict[str, Any]

    def __str__(self) -> str:
        shown = " ".join(f"{key}={_short(value)}" for key, value in self.facts.items() if value is not None)
        return f"{self.at:9.3f} {self.what:<10} {shown}"


@dataclass(slots=True)
class History:
    seed: int
    events: list[Event] = field(default_factory=list[Event])

    def note(self, at: float, what: str, **facts: Any) -> None:
        self.events.append(Event(at, what, facts))

    def of(self, *whats: str) -> list[Event]:
        return [event for event in self.events if event.what in whats]

    def __str__(self) -> str:
        return "\n".join(map(str, self.events))


@dataclass(frozen=True, slots=True)
class Finding:
    """Which promise was broken, and how."""

    check: str
    problem: str


def _short(value: Any) -> str:
    shown = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return shown if len(shown) <= 90 else f"{shown[:87]}..."
