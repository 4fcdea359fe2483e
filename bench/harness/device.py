"""What a server's actors did with their devices while a workload ran, where somebody can look. Pure."""

from collections.abc import Sequence
from itertools import pairwise

import msgspec


class Reading(msgspec.Struct, frozen=True):
    """Of `actors` together: the seconds that they have trained and sampled for until now, `at_s` of the run."""

    at_s: float
    train_s: float
    sample_s: float
    actors: int


class Split(msgspec.Struct, frozen=True):
    """Shares of the actors' time from one moment to another; what is left, they waited."""

    start_s: float
    end_s: float
    train: float
    sample: float


HEARTBEAT_S = 6.0
"""Within which an actor that is there says what it has done: a little more than it takes."""


def splits_of(readings: Sequence[Reading]) -> list[Split]:
    """One between each reading that tells something, and the next. What is as it was a heartbeat ago tells that the
    actors wait. None of a time in which an actor came or went, whose own seconds begin anew."""
    told = list[Reading]()
    for reading in readings:
        if not told or _sums(reading) != _sums(told[-1]) or reading.at_s - told[-1].at_s > HEARTBEAT_S:
            told.append(reading)
    return [_split([pair]) for pair in pairwise(told) if _goes_on(*pair)]


def split_between(readings: Sequence[Reading], start_s: float, end_s: float) -> Split | None:
    """Of a stretch of the run; actors tell with their heartbeats, so what happened just before its ends may count for
    the other side."""
    within = [reading for reading in readings if start_s <= reading.at_s <= end_s]
    pairs = [pair for pair in pairwise(within) if _goes_on(*pair)]
    return _split(pairs) if pairs else None


def _sums(reading: Reading) -> tuple[float, float, int]:
    return reading.train_s, reading.sample_s, reading.actors


def _goes_on(a: Reading, b: Reading) -> bool:
    return 0 < a.actors == b.actors and b.train_s >= a.train_s and b.sample_s >= a.sample_s


def _split(pairs: Sequence[tuple[Reading, Reading]]) -> Split:
    seconds = sum((b.at_s - a.at_s) * a.actors for a, b in pairs)
    train_s = sum(b.train_s - a.train_s for a, b in pairs)
    sample_s = sum(b.sample_s - a.sample_s for a, b in pairs)
    return Split(pairs[0][0].at_s, pairs[-1][1].at_s, train_s / seconds, sample_s / seconds)
