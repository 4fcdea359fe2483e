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


def splits_of(readings: Sequence[Reading]) -> list[Split]:
    """One between each reading that tells something new and the next: actors tell with every heartbeat. None of a time
    in which an actor came or went, whose own seconds begin anew."""
    told = list[Reading]()
    for reading in readings:
        if not told or (reading.train_s, reading.sample_s) != (told[-1].train_s, told[-1].sample_s):
            told.append(reading)
    return [_split(a, b) for a, b in pairwise(told) if a.actors == b.actors and _goes_on(a, b)]


def split_between(readings: Sequence[Reading], start_s: float, end_s: float) -> Split | None:
    """Of the measured time, as far as readings tell of it."""
    within = [split for split in splits_of(readings) if start_s <= split.start_s and split.end_s <= end_s]
    seconds = sum(split.end_s - split.start_s for split in within)
    if not seconds:
        return None
    train, sample = (
        sum((split.end_s - split.start_s) * getattr(split, kind) for split in within) / seconds
        for kind in ("train", "sample")
    )
    return Split(within[0].start_s, within[-1].end_s, train, sample)


def _goes_on(a: Reading, b: Reading) -> bool:
    return b.train_s >= a.train_s and b.sample_s >= a.sample_s


def _split(a: Reading, b: Reading) -> Split:
    seconds = (b.at_s - a.at_s) * a.actors
    return Split(a.at_s, b.at_s, (b.train_s - a.train_s) / seconds, (b.sample_s - a.sample_s) / seconds)
