"""What a run's records say: latencies, rates, errors, goodput, fairness. Pure."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise

import msgspec
import numpy as np

from .device import Reading, Split, split_between
from .records import Record
from .workload import Limits, Workload


class Spread(msgspec.Struct, frozen=True):
    """Percentiles are interpolated linearly between the two nearest values, as NumPy does by default."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Collection[float]) -> "Spread | None":
        if not values:
            return None
        every = np.asarray(list(values))
        p50, p90, p95, p99 = np.percentile(every, [50, 90, 95, 99]).tolist()
        return cls(float(every.mean()), p50, p90, p95, p99, float(every.max()))


class Figures(msgspec.Struct, frozen=True):
    """Of requests that were due in the measured time: how many, and what they met. Rates are of what ended within it,
    in a second. Goodput is of requests that neither failed nor took longer than the workload's limit."""

    requests: int
    errors: dict[str, int]
    latency_s: Spread | None
    acknowledged_s: Spread | None
    first_token_s: Spread | None
    between_tokens_s: Spread | None
    requests_per_s: float
    tokens_per_s: float
    goodput_per_s: float


class RunFigures(msgspec.Struct, frozen=True):
    """`by_kind` of all tenants, `by_tenant` of each. `fairness` is Jain's index of the tenants' tokens per second: 1
    where all got the same, 1 / n where one of n got all. `device` is what the actors did, where somebody looked."""

    seconds: float
    by_kind: dict[str, Figures]
    by_tenant: dict[str, dict[str, Figures]]
    fairness: float | None
    device: Split | None = None


def figures_of(workload: Workload, records: Sequence[Record], readings: Sequence[Reading] = ()) -> RunFigures:
    window = workload.warm_up_s, workload.warm_up_s + workload.duration_s

    def of(chosen: Sequence[Record]) -> dict[str, Figures]:
        kinds = sorted({record.kind for record in chosen})
        return {
            kind: _figures([record for record in chosen if record.kind == kind], window, workload.limits)
            for kind in kinds
        }

    tenants = sorted({record.tenant for record in records})
    by_tenant = {tenant: of([record for record in records if record.tenant == tenant]) for tenant in tenants}
    shares = [sum(figures.tokens_per_s for figures in kinds.values()) for kinds in by_tenant.values()]
    device = split_between(readings, *window)
    return RunFigures(workload.duration_s, of(records), by_tenant, jain_index(shares), device)


def jain_index(shares: Sequence[float]) -> float | None:
    """(sum x)^2 / (n sum x^2), from Jain, Chiu and Hawe, DEC-TR-301 (1984); None where nobody got anything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None


def _figures(records: Sequence[Record], window: tuple[float, float], limits: Limits) -> Figures:
    start, end = window
    due = [record for record in records if start <= record.due_s < end]
    ended = [record for record in records if start <= record.done_s < end and record.error is None]
    well = [record for record in due if record.error is None]
    in_time = [record for record in well if record.latency_s <= _limit(record, limits)]
    return Figures(
        requests=len(due),
        errors=dict(Counter(record.error for record in due if record.error is not None)),
        latency_s=Spread.of([record.latency_s for record in well]),
        acknowledged_s=_spread(well, lambda r: [] if r.acknowledged_s is None else [r.acknowledged_s - r.due_s]),
        first_token_s=_spread(well, lambda r: [time - r.due_s for time in r.token_s[:1]]),
        between_tokens_s=_spread(well, lambda r: [b - a for a, b in pairwise(r.token_s)]),
        requests_per_s=len(ended) / (end - start),
        tokens_per_s=sum(record.tokens for record in ended) / (end - start),
        goodput_per_s=len(in_time) / (end - start),
    )


def _spread(records: Iterable[Record], of: Callable[[Record], list[float]]) -> Spread | None:
    return Spread.of([value for record in records for value in of(record)])


def _limit(record: Record, limits: Limits) -> float:
    limit = limits.train_s if record.kind == "train" else limits.sample_s
    return float("inf") if limit is None else limit
