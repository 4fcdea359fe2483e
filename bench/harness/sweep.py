"""How much load a server bears: a workload at several loads, and where its goodput stops following. Pure."""

from collections.abc import Sequence

import msgspec

from .figures import RunFigures
from .workload import Arrival, Burst, Closed, Gamma, Poisson, Recorded, Workload

FOLLOWS = 0.95
"""A server bears a load while so much of what is offered is answered well, and in time."""


class Point(msgspec.Struct, frozen=True):
    """Requests a second, of all kinds: what came, and what was answered well and in time."""

    scale: float
    offered_per_s: float
    goodput_per_s: float
    tokens_per_s: float
    figures: RunFigures

    @property
    def is_borne(self) -> bool:
        return 0 < FOLLOWS * self.offered_per_s <= self.goodput_per_s


def scaled(workload: Workload, scale: float) -> Workload:
    """Open loops, recorded ones too, at `scale` times their rate; closed ones with `scale` times as many requests under
    way, at least one."""
    tenants = [msgspec.structs.replace(t, arrival=_scaled(t.arrival, scale)) for t in workload.tenants]
    is_recorded = all(isinstance(tenant.arrival, Recorded) for tenant in tenants)
    seconds = workload.duration_s / scale if is_recorded else workload.duration_s
    return msgspec.structs.replace(workload, tenants=tenants, duration_s=seconds)


def point_of(scale: float, run: RunFigures) -> Point:
    every = run.by_kind.values()
    return Point(
        scale,
        sum(figures.requests for figures in every) / run.seconds,
        sum(figures.goodput_per_s for figures in every),
        sum(figures.tokens_per_s for figures in every),
        run,
    )


def knee_of(points: Sequence[Point]) -> Point | None:
    """The greatest load that is borne, as all smaller ones are, and the next is not; None where there is none."""
    borne: Point | None = None
    for point in sorted(points, key=lambda point: point.scale):
        if not point.is_borne:
            return borne
        borne = point
    return None


def _scaled(arrival: Arrival, scale: float) -> Arrival:
    match arrival:
        case Closed():
            return msgspec.structs.replace(arrival, concurrency=max(1, round(arrival.concurrency * scale)))
        case Poisson() | Gamma():
            return msgspec.structs.replace(arrival, rate_per_s=arrival.rate_per_s * scale)
        case Recorded():
            return Recorded([at_s / scale for at_s in arrival.at_s])
        case Burst():
            return msgspec.structs.replace(arrival, size=max(1, round(arrival.size * scale)))
