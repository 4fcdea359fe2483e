"""Many histories: side by side in processes, each checked as soon as it is over."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from .checker import Checker
from .history import Finding, History
from .play import Stage

_BATCH = 50


@dataclass(frozen=True, slots=True)
class Verdict:
    seed: int
    events: int
    findings: tuple[Finding, ...]


def judged(history: History) -> Verdict:
    return Verdict(history.seed, len(history.events), tuple(Checker(history).findings()))


def verdicts(first: int, histories: int, workers: int) -> Iterator[Verdict]:
    """In the order of the seeds."""
    starts = range(first, first + histories, _BATCH)
    batches = [range(start, min(start + _BATCH, first + histories)) for start in starts]
    if workers == 1:
        for batch in batches:
            yield from _played(batch)
        return
    with ProcessPoolExecutor(workers) as pool:
        try:
            for some in pool.map(_played, batches):
                yield from some
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _played(seeds: range) -> list[Verdict]:
    stage = Stage()
    try:
        return [judged(stage.play(seed)) for seed in seeds]
    finally:
        stage.close()
