"""A run's numbers, made few enough for a plot: none of what stands out is lost. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .metrics import Source, SourcedPoint

_INF = math.inf


@dataclass(slots=True)
class _Bucket:
    """Of one name, in some steps: the points with its least and its greatest value, and one with each that is not
    finite."""

    low: float = _INF
    high: float = -_INF
    least: SourcedPoint | None = None
    greatest: SourcedPoint | None = None
    odd: dict[str, SourcedPoint] = field(default_factory=dict[str, SourcedPoint])


@dataclass(slots=True)
class _Series:
    """One name of one source; what comes goes into the last bucket, which is the `number`th stretch's."""

    first: SourcedPoint
    last: SourcedPoint
    number: int = -1
    buckets: list[_Bucket] = field(default_factory=list[_Bucket])


class Thinning:
    """Points come in the order of their steps, each source's within its `steps`: what one has changes nothing of what
    is kept of the other. Of each name, of each source, are kept the first and the last, and of each of equally many
    steps the least and the greatest value: `at_most` in all, 4 or more. Beside these, of what is not finite, one NaN
    and one infinity of either sign for each of those stretches."""

    def __init__(self, steps: Mapping[Source, range], at_most: int) -> None:
        self._buckets_at_most = (at_most - 2) // 2
        self._stretches = {
            source: (its[0], max(1, math.ceil(len(its) / self._buckets_at_most))) for source, its in steps.items()
        }
        self._series: dict[Source, dict[str, _Series]] = {}

    def add(self, point: SourcedPoint) -> None:
        first, width = self._stretches.setdefault(point.source, (point.step, 1))  # it may have come since
        number = max(0, min((point.step - first) // width, self._buckets_at_most - 1))
        of_source = self._series.setdefault(point.source, {})
        for name, value in point.values.items():
            if (series := of_source.get(name)) is None:
                series = of_source[name] = _Series(point, point)
            series.last = point
            if series.number != number:
                series.number = number
                series.buckets.append(_Bucket())
            bucket = series.buckets[-1]
            if -_INF < value < _INF:
                if value < bucket.low:
                    bucket.low, bucket.least = value, point
                if value > bucket.high:
                    bucket.high, bucket.greatest = value, point
            else:
                bucket.odd.setdefault(str(value), point)

    def points(self) -> list[SourcedPoint]:
        """By step, those of the loop first. Each with the values that are kept of it."""
        kept: dict[tuple[int, Source], tuple[SourcedPoint, set[str]]] = {}

        def keep(point: SourcedPoint | None, name: str) -> None:
            if point is not None:
                kept.setdefault((point.step, point.source), (point, set()))[1].add(name)

        for name, series in (each for of_source in self._series.values() for each in of_source.items()):
            keep(series.first, name)
            keep(series.last, name)
            for bucket in series.buckets:
                for point in (bucket.least, bucket.greatest, *bucket.odd.values()):
                    keep(point, name)
        return [_with(point, names) for _, (point, names) in sorted(kept.items(), key=lambda item: item[0])]


def _with(point: SourcedPoint, names: set[str]) -> SourcedPoint:
    values = {name: value for name, value in point.values.items() if name in names}
    return SourcedPoint(point.source, point.step, point.at, values)
