"""Percentiles, fairness, rates and goodput, to the digit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.bench.figures import Spread, figures_of, jain_index
from lorry.bench.records import Record
from lorry.bench.workload import Limits, Tenant, Train, Workload

ANY = Workload("w", "m", [Tenant("a", [Train()])], warm_up_s=10, duration_s=100, limits=Limits(train_s=2.0))


def record(tenant: str, due_s: float, latency_s: float, tokens: int = 10, error: str | None = None) -> Record:
    return Record(tenant, "train", 0, due_s, due_s, due_s + latency_s, tokens, error=error)


def test_percentiles_lie_between_the_nearest_values() -> None:
    spread = Spread.of([float(i) for i in range(1, 102)])
    assert spread == Spread(mean=51, p50=51, p90=91, p95=96, p99=100, most=101)
    two = Spread.of([4.0, 1.0])
    assert two is not None
    assert [two.mean, two.p50, two.p90, two.p95, two.p99, two.most] == pytest.approx([2.5, 2.5, 3.7, 3.85, 3.97, 4.0])
    assert Spread.of([]) is None


def test_jains_index_to_the_digit() -> None:
    assert jain_index([1, 1, 1, 1]) == 1
    assert jain_index([5, 0, 0, 0]) == 0.25
    assert jain_index([1, 2, 3]) == pytest.approx(36 / 42)
    assert jain_index([0, 0]) is None


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_jains_index_is_between_one_share_of_all_and_one_and_knows_no_unit(shares: list[float], unit: float) -> None:
    index = jain_index(shares)
    assert index is not None
    assert 1 / len(shares) - 1e-9 <= index <= 1 + 1e-9
    assert jain_index([share * unit for share in shares]) == pytest.approx(index)


def test_only_what_was_due_in_the_measured_time_counts_and_rates_are_of_what_ended_in_it() -> None:
    records = [
        record("a", 1, 1),  # warm-up
        record("a", 9, 2, tokens=70),  # due in the warm-up, ended after it
        record("a", 20, 1, tokens=100),
        record("b", 30, 3, tokens=30),  # beyond the limit
        record("b", 40, 1, error="Refused"),
        record("b", 109, 5, tokens=1000),  # ended after the end
    ]
    run = figures_of(ANY, records)
    figures = run.by_kind["train"]
    assert (figures.requests, figures.errors) == (4, {"Refused": 1})
    assert figures.requests_per_s == pytest.approx(3 / 100)
    assert figures.tokens_per_s == pytest.approx(200 / 100)
    assert figures.goodput_per_s == pytest.approx(1 / 100)
    assert figures.latency_s is not None and figures.latency_s.most == pytest.approx(5)
    assert run.fairness == pytest.approx(jain_index([170, 30]))
    assert run.by_tenant["b"]["train"].requests == 3
