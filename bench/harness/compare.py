"""What changed between two benchmarks, and whether that is more than their own noise. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from scipy import stats

from .totals import Totals, measures_of

Verdict: TypeAlias = Literal["more", "less", "within the noise", "noise unknown", "same"]


@dataclass(frozen=True, slots=True)
class Change:
    """Of a measure's mean: `relative` is the change over the first mean, and `low` to `high` its 95 % confidence
    interval by Welch's t, where both sides have two runs or more."""

    measure: str
    before: float
    after: float
    relative: float | None
    low: float | None
    high: float | None
    verdict: Verdict


def changes(before: Totals, after: Totals) -> list[Change]:
    """Of the measures that both have."""
    sides = [[measures_of(run) for run in totals.runs] for totals in (before, after)]
    names = [name for name in sides[0][0] if all(name in run for side in sides for run in side)]
    return [_change(name, *([run[name] for run in side] for side in sides)) for name in names]


def differences_of_setting(before: Totals, after: Totals) -> list[str]:
    """What else differs: a comparison is of what is alike but for one thing."""
    found = list[str]()
    if before.workload != after.workload:
        found.append("the workloads differ")
    for what in ("server", "machine", "cores", "python", "packages", "commit"):
        one, other = getattr(before.facts, what), getattr(after.facts, what)
        if one != other:
            found.append(f"{what}: {_shown(one, other)}")
    return found


def _shown(one: object, other: object) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        return ", ".join(f"{name} {one.get(name)} and {other.get(name)}" for name in names)
    return f"{one} and {other}"


def _change(name: str, before: Sequence[float], after: Sequence[float]) -> Change:
    first, second = (sum(values) / len(values) for values in (before, after))
    relative = (second - first) / first if first else None
    if first == second:
        return Change(name, first, second, relative, None, None, "same")
    if min(len(before), len(after)) < 2:
        return Change(name, first, second, relative, None, None, "noise unknown")
    if not _varies(before) and not _varies(after):
        return Change(name, first, second, relative, None, None, "more" if second > first else "less")
    interval = stats.ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
    bounds = [float(bound) for bound in (interval.low, interval.high)]
    verdict: Verdict = "more" if bounds[0] > 0 else "less" if bounds[1] < 0 else "within the noise"
    low, high = (bound / first if first else None for bound in bounds)
    return Change(name, first, second, relative, low, high, verdict)


def _varies(values: Sequence[float]) -> bool:
    return min(values) < max(values)
