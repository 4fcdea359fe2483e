"""What is wrong with a run, by what its steps told. Pure."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median, variance
from typing import Literal, TypeAlias

from ...wire.metrics import RunPoint
from ...wire.timelines import FailedCommand
from ...wire.words import lasting

Kind: TypeAlias = Literal["not finite", "failed", "stalled", "flat"]

_RECENT = 50
"""Of a metric's newest values so many are looked at, and a reward is not called flat before there are."""
_STEPS_TIMED = 20
_STALLED_FACTOR = 10.0
_STALLED_AT_LEAST_S = 120.0
_STALLED_AT_MOST_S = 86_400.0
"""A loop that told nothing for a day is over, not stalled."""
_HUGE = 1e100
"""Whose squares are numbers still."""
_NOISE = 2.0
"""Standard errors that a mean must have moved by."""
_REWARDS = ("reward", "accuracy", "correct", "return", "score")
"""A metric with one of these words in its name is to rise."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """`since` is in Unix seconds: when it was first so, as far as is known."""

    kind: Kind
    text: str
    since: float

    @property
    def is_serious(self) -> bool:
        return self.kind in ("not finite", "failed")


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a run: the newest points of each source by step, and its newest failures. `is_over` says that
    its client ended its session; `waiting` of its commands are not over, and then it is Lorry that is slow."""

    points: Sequence[RunPoint]
    failures: Sequence[FailedCommand] = field(default_factory=list[FailedCommand])
    is_over: bool = False
    waiting: int = 0


def alarms(told: Told, now: float) -> list[Alarm]:
    """Serious ones first."""
    finders: tuple[Callable[[Told, float], Iterable[Alarm]], ...] = (_not_finite, _failed, _stalled, _flat)
    return [alarm for find in finders for alarm in find(told, now)]


def _not_finite(told: Told, now: float) -> Iterable[Alarm]:
    for name, points in _by_name(told.points).items():
        bad = [point for point in points[-_RECENT:] if not math.isfinite(point.values[name])]
        if bad:
            first, last = bad[0], bad[-1]
            where = f"at step {first.step}" if first is last else f"from step {first.step} to {last.step}"
            count = f" ({len(bad)} times)" if len(bad) > 1 else ""
            yield Alarm("not finite", f"{name} was {last.values[name]} {where}{count}", first.at)


def _failed(told: Told, now: float) -> Iterable[Alarm]:
    """Since the last step that was told: what failed before, the run got over."""
    last = max((point.at for point in told.points if point.source == "training"), default=0.0)
    for failure in told.failures[:3]:
        if failure.at >= last:
            yield Alarm("failed", f"{failure.kind} (seq {failure.seq}): {failure.message}", failure.at)


def _stalled(told: Told, now: float) -> Iterable[Alarm]:
    times = [point.at for point in told.points if point.source == "training"][-_STEPS_TIMED:]
    if told.is_over or len(times) < 3:
        return
    usual = median(later - earlier for earlier, later in pairwise(times))
    silent = now - times[-1]
    if max(_STALLED_FACTOR * usual, _STALLED_AT_LEAST_S) < silent < _STALLED_AT_MOST_S:
        where = "some of it waits here" if told.waiting else "nothing of it waits here, so it is its own loop"
        text = f"no step for {lasting(silent)}, where one took {usual:.3g} s; {where}"
        yield Alarm("stalled", text, times[-1])


def _flat(told: Told, now: float) -> Iterable[Alarm]:
    for name, points in _by_name(told.points).items():
        recent = points[-_RECENT:]
        values = [point.values[name] for point in recent]
        can_be_averaged = len(values) == _RECENT and all(abs(value) < _HUGE for value in values)
        if _is_reward(name) and can_be_averaged and not _has_moved(values):
            early, late = _halves(values)
            text = f"{name} has not risen in {_RECENT} steps: {fmean(early):.4g}, then {fmean(late):.4g}"
            yield Alarm("flat", text, recent[0].at)


def _is_reward(name: str) -> bool:
    return any(word in name.casefold() for word in _REWARDS)


def _has_moved(values: Sequence[float]) -> bool:
    """Upwards, by more than noise makes it. Welch's standard error of a difference of means."""
    early, late = _halves(values)
    error = math.sqrt(variance(early) / len(early) + variance(late) / len(late))
    return fmean(late) - fmean(early) > _NOISE * error


def _halves(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    return values[: len(values) // 2], values[len(values) // 2 :]


def _by_name(points: Iterable[RunPoint]) -> Mapping[str, list[RunPoint]]:
    found: dict[str, list[RunPoint]] = {}
    for point in points:
        for name in point.values:
            found.setdefault(name, []).append(point)
    return found
