"""Where the goodput of a server that is known stops following the load."""

import msgspec
import pytest

from lorry.bench.figures import figures_of
from lorry.bench.sweep import Point, knee_of, point_of, scaled
from lorry.bench.workload import Burst, Closed, Gamma, Limits, Poisson, Tenant, Train, Workload

from .stub import Stub, driven


def workload(*arrivals: Closed | Poisson | Gamma | Burst) -> Workload:
    tenants = [Tenant(f"t{i}", [Train()], arrival) for i, arrival in enumerate(arrivals)]
    return Workload("w", "m", tenants, warm_up_s=10, duration_s=200, limits=Limits(train_s=1.0))


def test_the_knee_is_where_a_known_server_is_full() -> None:
    """One request at a time of 0.1 s: ten a second. Close below that a queue of random arrivals is longer than the
    limit of a second allows, by M/D/1's mean of rho / (2 (1 - rho)) tenths; at half of it hardly ever."""
    base = workload(Poisson(rate_per_s=1))
    points = list[Point]()
    for scale in (12, 2, 5, 8, 20):
        at_load = scaled(base, scale)
        points.append(point_of(scale, figures_of(at_load, driven(at_load, Stub(lambda n, i: 0.1, at_once=1)))))
    knee = knee_of(points)
    assert knee is not None and knee.scale == 8
    by_scale = {point.scale: point for point in points}
    assert by_scale[20].tokens_per_s == pytest.approx(10 * 128, rel=0.02), "it does what it can"
    assert by_scale[20].goodput_per_s < 1, "and nothing of that is in time"
    assert by_scale[5].goodput_per_s == by_scale[5].offered_per_s == pytest.approx(5, rel=0.2)


def test_a_load_that_is_borne_behind_one_that_is_not_is_no_knee() -> None:
    run = figures_of(workload(Poisson(1)), [])
    points = [Point(s, 10.0, goodput, 0.0, run) for s, goodput in ((4, 10.0), (1, 9.6), (2, 9.4))]
    knee = knee_of(points)
    assert knee is not None and knee.scale == 1
    assert knee_of([Point(1, 10.0, 5.0, 0.0, run)]) is None
    assert knee_of([Point(1, 10.0, 10.0, 0.0, run)]) is None, "who knows what it bears beyond"
    assert knee_of([Point(1, 0.0, 0.0, 0.0, run)]) is None


def test_every_arrival_is_scaled_and_nothing_else() -> None:
    base = workload(Closed(3, think_s=1), Poisson(2, ramp_up_s=1), Gamma(2, 0.5), Burst(2, 3))
    found = scaled(base, 0.4)
    arrivals = [tenant.arrival for tenant in found.tenants]
    assert arrivals == [Closed(1, think_s=1), Poisson(0.8, ramp_up_s=1), Gamma(0.8, 0.5), Burst(1, 3)]
    assert msgspec.structs.replace(found, tenants=base.tenants) == base
