"""A run's numbers, made few enough for a plot: none of what stands out is lost. Pure."""

import math
from dataclasses import dataclass, field
from typing import TypeAlias

from .metrics import Source, SourcedPoint

_Series: TypeAlias = tuple[Source, str]


@dataclass(slots=True)
class _Bucket:
    """Of one name, in some steps: the points with its least and its greatest value, and one with each that is not
    finite."""

    least: SourcedPoint | None = None
    greatest: SourcedPoint | None = None
    odd: dict[str, SourcedPoint] = field(default_factory=dict[str, SourcedPoint])


class Thinning:
    """Points come in the order of their steps, from `first` to `last`. Of each name, of each source, are kept the
    first and the last, and of each of equally many steps the least and the greatest value: `at_most` in all, 4 or
    more. Beside these, of what is not finite, one NaN and one infinity of either sign for each of those stretches."""

    def __init__(self, first: int, last: int, at_most: int) -> None:
        self._first = first
        self._buckets_at_most = (at_most - 2) // 2
        self._width = max(1, math.ceil((last - first + 1) / self._buckets_at_most))
        self._buckets: dict[tuple[_Series, int], _Bucket] = {}
        self._ends: dict[_Series, list[SourcedPoint]] = {}

    def add(self, point: SourcedPoint) -> None:
        number = min((point.step - self._first) // self._width, self._buckets_at_most - 1)
        for name, value in point.values.items():
            series = point.source, name
            self._ends.setdefault(series, [point, point])[1] = point
            if (bucket := self._buckets.get((series, number))) is None:
                bucket = self._buckets[series, number] = _Bucket()
            if not math.isfinite(value):
                bucket.odd.setdefault(str(value), point)
                continue
            if bucket.least is None or value < bucket.least.values[name]:
                bucket.least = point
            if bucket.greatest is None or value > bucket.greatest.values[name]:
                bucket.greatest = point

    def points(self) -> list[SourcedPoint]:
        """By step, those of the loop first. Each with the values that are kept of it."""
        kept: dict[tuple[int, Source], tuple[SourcedPoint, set[str]]] = {}

        def keep(point: SourcedPoint | None, name: str) -> None:
            if point is not None:
                kept.setdefault((point.step, point.source), (point, set()))[1].add(name)

        for (series, _), bucket in self._buckets.items():
            for point in (bucket.least, bucket.greatest, *bucket.odd.values()):
                keep(point, series[1])
        for series, ends in self._ends.items():
            for point in ends:
                keep(point, series[1])
        return [_with(point, names) for _, (point, names) in sorted(kept.items())]


def _with(point: SourcedPoint, names: set[str]) -> SourcedPoint:
    values = {name: value for name, value in point.values.items() if name in names}
    return SourcedPoint(point.source, point.step, point.at, values)
