"""How fast things go, by what was counted at two moments. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from .overview import ActorLoad, Overview
from .types import UsageKind


class Busy(NamedTuple):
    """Parts of an actor's time, from 0 to 1."""

    train: float
    sample: float


def tokens_per_s(earlier: Sequence[Overview], now: Overview) -> dict[UsageKind, float]:
    """By the oldest of those that count from the same start; empty where there is none."""
    before = next((one for one in earlier if one.counted_since == now.counted_since and one.at < now.at), None)
    if before is None:
        return {}
    return {kind: (n - before.tokens.get(kind, 0)) / (now.at - before.at) for kind, n in now.tokens.items()}


def busy(earlier: Sequence[Overview], actor: ActorLoad) -> Busy | None:
    """Lately, where it was measured twice; else since it started. None before it was measured."""
    if actor.measured_at is None:
        return None
    seen = [one for overview in earlier for one in overview.actors if is_same(one, actor)]
    for before in seen:
        if before.measured_at is not None and before.measured_at < actor.measured_at:
            return _between(before.train_s, before.sample_s, before.measured_at, actor, actor.measured_at)
    return _between(0.0, 0.0, actor.started_at, actor, actor.measured_at)


def is_same(one: ActorLoad, other: ActorLoad) -> bool:
    """One that was started again counts anew."""
    return (one.actor, one.started_at) == (other.actor, other.started_at)


def _between(train_s: float, sample_s: float, then: float, actor: ActorLoad, now: float) -> Busy:
    took = max(now - then, 1e-9)
    return Busy(min(1.0, (actor.train_s - train_s) / took), min(1.0, (actor.sample_s - sample_s) / took))
