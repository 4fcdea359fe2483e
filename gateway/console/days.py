"""Usage by day of UTC. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime

from ...wire.types import UsageEvent, UsageKind

KINDS: tuple[UsageKind, ...] = ("train", "prefill", "cached_prefill", "sample")


@dataclass(slots=True)
class Spent:
    """Tokens by kind, `gb_hours` of checkpoints, and what all of it cost."""

    tokens: dict[UsageKind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    gb_hours: float = 0.0
    cost_usd: float = 0.0

    def add(self, event: UsageEvent) -> None:
        if event.kind == "storage":
            self.gb_hours += event.gb_hours
        else:
            self.tokens[event.kind] += event.tokens
        self.cost_usd += event.cost_usd


def by_day(events: Iterable[UsageEvent]) -> Mapping[date, Spent]:
    """The newest first, and only days on which something was used."""
    days = defaultdict[date, Spent](Spent)
    for event in events:
        days[datetime.fromtimestamp(event.hour, UTC).date()].add(event)
    return dict(sorted(days.items(), reverse=True))


def by_run(events: Iterable[UsageEvent]) -> Mapping[str, Spent]:
    """The dearest first, then by tokens; "" is what was sampled of bare base models."""
    runs = defaultdict[str, Spent](Spent)
    for event in events:
        runs[event.run].add(event)
    return dict(sorted(runs.items(), key=lambda item: (-item[1].cost_usd, -sum(item[1].tokens.values()))))


def in_all(events: Iterable[UsageEvent]) -> Spent:
    whole = Spent()
    for event in events:
        whole.add(event)
    return whole
