"""A run's numbers in the database: what is asked of them is looked up, and walks over no more than it tells."""

import pytest

from lorry.storage.metrics import NEWEST, OLDEST, PAGE
from lorry.storage.store import Store
from lorry.storage.timelines import FAILURES
from lorry.wire.ids import RunId
from lorry.wire.metrics import BYTES_AT_ONCE, MetricPlace, MetricPoint, RunMetrics

from .test_store import RUN
from .test_store import store as store  # a fixture

BOTH = range(0, 30, 3)


@pytest.fixture
def measured(store: Store) -> Store:
    """Training has each step, the loop each third, and one far away."""
    with store.transaction():
        for step in range(30):
            store.step_measured(RUN.id, "optim_step", {"x": float(step)}, 0, 1.0)
        store.metrics_logged(RUN.id, [MetricPoint(step, {"y": float(step)}) for step in (*BOTH, 10**9)], 1.0)
    return store


def pages(store: Store, most: int) -> list[RunMetrics]:
    found = [store.run_metrics(RUN.id, None, most)]
    while found[-1].next is not None:
        found.append(store.run_metrics(RUN.id, found[-1].next, most))
    return found


@pytest.mark.parametrize("most", [1, 2, 7, 1000])
def test_pages_are_by_step_and_the_loops_before_trainings(measured: Store, most: int) -> None:
    expected = sorted([(step, "training") for step in range(30)] + [(step, "loop") for step in (*BOTH, 10**9)])
    found = pages(measured, most)
    assert [(p.step, p.source) for page in found for p in page.points] == expected
    assert all(len(page.points) == most for page in found[:-1])
    behind = measured.run_metrics(RUN.id, MetricPlace(29, "training"), most)
    assert [(p.step, p.source) for p in behind.points] == [(10**9, "loop")]


def test_a_page_ends_where_its_bytes_are_many(store: Store) -> None:
    large = {f"{i:0200}": 1.0 for i in range(256)}
    with store.transaction():
        store.metrics_logged(RUN.id, [MetricPoint(step, large) for step in range(50)], 1.0)
    found = pages(store, 1000)
    assert [p.step for page in found for p in page.points] == list(range(50))
    assert max(len(page.points) for page in found) * 256 * 200 < 1.1 * BYTES_AT_ONCE
    newest = store.latest_metrics([RUN.id] * 2, 40)
    assert len(newest) * 256 * 200 < BYTES_AT_ONCE and newest[-1].step == 49
    assert len(store.latest_metrics([RUN.id] * 400)) * 256 * 200 < 8 * BYTES_AT_ONCE


def test_the_newest_of_each_source_come_in_the_order_of_their_steps(measured: Store) -> None:
    def found(most: int) -> list[tuple[str, int]]:
        return [(p.source, p.step) for p in measured.latest_metrics([RunId("none"), RUN.id], most)]

    assert found(1) == [("loop", 10**9), ("training", 29)]
    assert found(3) == [("loop", 24), ("loop", 27), ("loop", 10**9), *(("training", step) for step in (27, 28, 29))]
    assert len(found(100)) == 41


def test_each_source_has_its_own_first_and_last_step(measured: Store) -> None:
    assert measured.metric_steps(RUN.id) == {"loop": range(10**9 + 1), "training": range(30)}
    assert measured.metric_steps(RunId("none")) == {}


@pytest.mark.parametrize("sql", [PAGE, OLDEST, NEWEST])
def test_numbers_are_found_without_a_walk_or_a_sort(store: Store, sql: str) -> None:
    named = {"run": RUN.id, "source": 0, "loop": 0, "training": 0, "most": 1}
    plan = [row["detail"] for row in store.rows(f"EXPLAIN QUERY PLAN {sql}", **named)]
    looks = [line for line in plan if "run_metrics" in line]
    assert looks and all("USING PRIMARY KEY (run=? AND source=?" in line for line in looks), plan
    assert not any("TEMP B-TREE" in line or "SCAN run_metrics" in line for line in plan), plan


def test_failures_are_found_without_a_walk_over_what_went_well(store: Store) -> None:
    plan = [row["detail"] for row in store.rows(f"EXPLAIN QUERY PLAN {FAILURES}", RUN.id, 20)]
    assert any("commands_failed_of_lane (lane=?)" in line for line in plan), plan
    assert not any("TEMP B-TREE" in line for line in plan), plan
