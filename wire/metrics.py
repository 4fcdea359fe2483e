"""Numbers of a run, step by step: what its training came to, and what its user's loop logged beside."""

import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal, TypeAlias

import msgspec

from .errors import InvalidRequestError
from .ids import RunId
from .limits import Count

Source: TypeAlias = Literal["training", "loop"]
"""Who tells: actors, of `forward_backward` and `optim_step`; or the user's own program."""

POINTS_AT_ONCE = 1000
BYTES_AT_ONCE = 1 << 20
"""Of points in one message: what the broker reads of them at a time keeps all others waiting."""
NAMES_OF_A_RUN = 256
RUNS_AT_ONCE = 200
LATEST_AT_ONCE = 1000
LONGEST_NAME = 200
THINNED_AT_LEAST = 4
THINNED_AT_MOST = 10_000
THINNED_VALUES = 50_000
"""Of all names of a thinned answer together."""
_POINT_BYTES, _VALUE_BYTES = 64, 16
"""What one takes on the wire at most, beside its names."""
_HALF = re.compile("[\ud800-\udfff]")
_LATEST = 1e11
"""Unix seconds: a later moment is none that a calendar could tell."""


class MetricPoint(msgspec.Struct, frozen=True, omit_defaults=True):
    """Any numbers under their names, NaN and infinities too. `at` is in Unix seconds, None for when it arrives."""

    step: Count
    values: dict[str, float]
    at: float | None = None


class MetricPlace(msgspec.Struct, frozen=True):
    """After which point a page goes on."""

    step: Count
    source: Source


class SourcedPoint(msgspec.Struct, frozen=True):
    source: Source
    step: int
    at: float
    values: dict[str, float]


class RunMetrics(msgspec.Struct, frozen=True):
    """Points by step, those of the loop before those of training; `next` is where it goes on, None at the end."""

    points: list[SourcedPoint]
    next: MetricPlace | None = None


class RunPoint(msgspec.Struct, frozen=True):
    """What a step of a run has come to by now: all that is known of it from this source."""

    run: RunId
    source: Source
    step: int
    at: float
    values: dict[str, float]


class LogMetrics(msgspec.Struct, frozen=True, tag="log_metrics"):
    """The payload is a list of MetricPoint, of the user's loop. What was logged under the same step before stays, but
    for the names that come again."""

    request: int
    run: RunId


class ReadMetrics(msgspec.Struct, frozen=True, tag="read_metrics", omit_defaults=True):
    """Some of a run's points, up to `most` behind `after`, fewer where they are large; or all, thinned for a plot to
    `at_most_points` for each name, and to fewer where the names are many. With `names`, those alone. The answer is a
    RunMetrics."""

    request: int
    run: RunId
    after: MetricPlace | None = None
    most: Annotated[int, msgspec.Meta(ge=1, le=POINTS_AT_ONCE)] = POINTS_AT_ONCE
    at_most_points: Annotated[int, msgspec.Meta(ge=THINNED_AT_LEAST, le=THINNED_AT_MOST)] | None = None
    names: list[str] | None = None


def point_of(step: int, values: Mapping[str, object], at: float | None = None) -> MetricPoint:
    """As a program says it, with whatever `float` takes for a number, strings apart, and `operator.index` for a count.
    Raises InvalidRequestError."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError.of("metrics", name, "names that are strings")
        numbers[name] = _number(f"metrics[{name!r}]", value)
    point = MetricPoint(_count(step), numbers, None if at is None else _number("at", at))
    check_points([point])
    return point


def _number(field: str, value: object) -> float:
    try:
        if not isinstance(value, str | bytes | bytearray):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidRequestError.of(field, value, "a number")


def _count(step: object) -> int:
    """Of any integer type, numpy's among them."""
    try:
        if not isinstance(step, bool) and 0 <= (count := operator.index(step)) < 2**62:  # type: ignore[arg-type]
            return count
    except TypeError:
        pass
    raise InvalidRequestError.of("step", step, "a count from 0 on")


def size_of(values: Mapping[str, float]) -> int:
    """Bytes that a point with these takes on the wire at most."""
    return _POINT_BYTES + sum(_VALUE_BYTES + (1 if name.isascii() else 4) * len(name) for name in values)


def in_messages(points: Iterable[MetricPoint]) -> Iterator[list[MetricPoint]]:
    """As many at a time as one message takes."""
    some: list[MetricPoint] = []
    size = 0
    for point in points:
        more = size_of(point.values)
        if some and (len(some) == POINTS_AT_ONCE or size + more > BYTES_AT_ONCE):
            yield some
            some, size = [], 0
        some.append(point)
        size += more
    if some:
        yield some


class LatestMetrics(msgspec.Struct, frozen=True, tag="latest_metrics", omit_defaults=True):
    """The last points of each of these runs, of each source: `most`, or fewer where they are large, by run, source and
    step. Runs times `most` are `LATEST_AT_ONCE` at most. The answer is a list of RunPoint; of runs that are not the
    asking tenant's it has none."""

    request: int
    runs: Annotated[list[RunId], msgspec.Meta(max_length=RUNS_AT_ONCE)]
    most: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1


def check_points(points: Iterable[MetricPoint]) -> None:
    """Raises InvalidRequestError."""
    names = set[str]()
    for i, point in enumerate(points):
        if point.at is not None and not 0 <= point.at < _LATEST:
            raise InvalidRequestError.of(f"points[{i}].at", point.at, "Unix seconds")
        if point.values.keys() <= names:
            continue
        for name in point.values:
            if not is_name(name):
                where = f"points[{i}].values"
                raise InvalidRequestError.of(where, name, f"names of 1 to {LONGEST_NAME} characters of Unicode")
        names.update(point.values)


def is_name(name: str) -> bool:
    """Half of a surrogate pair, which JSON and Python allow, is no character: it cannot be written."""
    return 1 <= len(name) <= LONGEST_NAME and _HALF.search(name) is None
