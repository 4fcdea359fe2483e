"""How sure figures are, and what is said of a change."""

import msgspec
import pytest

from lorry.bench.compare import changes, differences_of_setting
from lorry.bench.figures import figures_of
from lorry.bench.records import Record
from lorry.bench.totals import Facts, Totals, estimate, totals_of
from lorry.bench.workload import Tenant, Train, Workload

WORKLOAD = Workload("w", "m", [Tenant("a", [Train()])], warm_up_s=0, duration_s=10)
FACTS = Facts("here", "a machine", 2, "3.11", {"lorry": "1"}, None, "now")


def totals(latencies: list[float], facts: Facts = FACTS, workload: Workload = WORKLOAD) -> Totals:
    """One run for each, of one request."""
    runs = [[Record("a", "train", 0, 1, 1, 1 + latency, 7)] for latency in latencies]
    return totals_of(facts, workload, [figures_of(workload, run) for run in runs])


def test_a_mean_has_students_interval() -> None:
    """95 % of 1, 2, 3: t of two degrees of freedom is 4.302653, the standard error 1 / sqrt(3)."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert estimate([5.0]) == msgspec.structs.replace(found, mean=5.0, low=None, high=None)


def change_of_latency(before: list[float], after: list[float]) -> tuple[str, float]:
    found = {change.measure: change for change in changes(totals(before), totals(after))}
    change = found["train latency p50 s"]
    assert change.relative is not None
    return change.verdict, change.relative


def test_a_change_is_told_from_noise() -> None:
    assert change_of_latency([1.0, 1.1, 0.9], [2.0, 2.1, 1.9]) == ("more", pytest.approx(1.0))
    assert change_of_latency([2.0, 2.1, 1.9], [1.0, 1.1, 0.9]) == ("less", pytest.approx(-0.5))
    assert change_of_latency([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])[0] == "within the noise"
    assert change_of_latency([1.0], [2.0])[0] == "noise unknown"
    assert change_of_latency([1.0, 1.0], [1.0, 1.0])[0] == "same"
    assert change_of_latency([1.0, 1.0], [2.0, 2.0])[0] == "more"


def test_what_else_differs_is_said() -> None:
    other = msgspec.structs.replace(FACTS, cores=4, packages={"lorry": "2"})
    quicker = msgspec.structs.replace(WORKLOAD, duration_s=5)
    assert differences_of_setting(totals([1.0]), totals([1.0])) == []
    assert differences_of_setting(totals([1.0]), totals([1.0], other, quicker)) == [
        "the workloads differ",
        "cores: 2 and 4",
        "packages: lorry 1 and 2",
    ]


def test_totals_are_read_as_they_were_written() -> None:
    written = totals([1.0, 2.0])
    assert msgspec.json.decode(msgspec.json.encode(written), type=Totals) == written
