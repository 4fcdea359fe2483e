"""What is thinned for a plot keeps all that stands out; and how metrics of several parts come together."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.wire.metrics import BYTES_AT_ONCE, POINTS_AT_ONCE, MetricPoint, Source, SourcedPoint, in_messages
from lorry.wire.reducing import reduced
from lorry.wire.thinning import Thinning

VALUES = st.dictionaries(st.sampled_from(["a", "b"]), st.floats(allow_nan=True, allow_infinity=True), min_size=1)
SOURCES: tuple[Source, ...] = ("loop", "training")
POINTS = st.dictionaries(st.tuples(st.integers(0, 300), st.sampled_from(SOURCES)), VALUES, min_size=1, max_size=120)


def in_order(told: dict[tuple[int, Source], dict[str, float]]) -> list[SourcedPoint]:
    return [SourcedPoint(source, step, 1.0, values) for (step, source), values in sorted(told.items())]


def steps_of(points: list[SourcedPoint]) -> dict[Source, range]:
    of = {source: [point.step for point in points if point.source == source] for source in SOURCES}
    return {source: range(min(steps), max(steps) + 1) for source, steps in of.items() if steps}


def thinned(points: list[SourcedPoint], at_most: int) -> list[SourcedPoint]:
    thinning = Thinning(steps_of(points), at_most)
    for point in points:
        thinning.add(point)
    return thinning.points()


def kinds(values: list[float]) -> set[str]:
    return {str(value) for value in values if not math.isfinite(value)}


@given(POINTS, st.integers(4, 60))
def test_of_each_name_the_ends_the_extremes_and_all_that_is_not_finite_are_kept(
    told: dict[tuple[int, Source], dict[str, float]], at_most: int
) -> None:
    points = in_order(told)
    thin = thinned(points, at_most)
    assert [(p.step, p.source) for p in thin] == sorted({(p.step, p.source) for p in thin})
    for source in SOURCES:
        if (steps := steps_of(points).get(source)) is None:
            continue
        width = max(1, math.ceil(len(steps) / ((at_most - 2) // 2)))
        for name in ("a", "b"):
            before, after = (
                [(p.step, p.values[name]) for p in some if p.source == source and name in p.values]
                for some in (points, thin)
            )
            if not before:
                assert not after
                continue
            assert {(step, repr(v)) for step, v in after} <= {(step, repr(v)) for step, v in before}
            assert (after[0][0], after[-1][0]) == (before[0][0], before[-1][0])
            finite = [v for _, v in before if math.isfinite(v)]
            if finite:
                assert {min(finite), max(finite)} <= {v for _, v in after}
            assert sum(math.isfinite(v) for _, v in after) <= at_most
            for start in steps[::width]:
                stretch = range(start, start + width)
                some = [[v for step, v in each if step in stretch] for each in (before, after)]
                assert kinds(some[0]) == kinds(some[1])


def test_few_points_are_all_kept() -> None:
    points = [SourcedPoint("loop", step, 1.0, {"x": float(step)}) for step in range(20)]
    assert thinned(points, 100) == points


@given(POINTS, st.integers(4, 60), st.lists(st.integers(0, 10**12), unique=True))
def test_what_one_source_has_changes_nothing_of_what_is_kept_of_the_other(
    told: dict[tuple[int, Source], dict[str, float]], at_most: int, far: list[int]
) -> None:
    """A loop that counts tokens does not flatten the curve of its training."""
    training = [point for point in in_order(told) if point.source == "training"]
    loop = [SourcedPoint("loop", step, 1.0, {"a": 1.0}) for step in far]
    both = thinned(sorted(training + loop, key=lambda p: (p.step, p.source)), at_most)
    assert repr([p for p in both if p.source == "training"]) == repr(thinned(training, at_most))


def test_what_came_since_its_steps_were_read_takes_no_more_room() -> None:
    thinning = Thinning({"training": range(50, 60)}, 10)
    for step in range(100):
        for source in SOURCES:
            thinning.add(SourcedPoint(source, step, 1.0, {"x": float(step)}))
    for source in SOURCES:
        steps = [point.step for point in thinning.points() if point.source == source]
        assert len(steps) <= 10 and {0, 99} <= set(steps)


@pytest.mark.parametrize(
    ("name", "comes_to"),
    [("a:sum", 5.0), ("a:mean", 3.5), ("a:min", 1.0), ("a:max", 4.0), ("grad_norm", 4.0), ("a:unheard_of", 4.0)],
)
def test_metrics_come_together_as_their_names_end(name: str, comes_to: float) -> None:
    """The SDK's rule, for what it sends in parts."""
    assert reduced([({name: 1.0}, 1), ({name: 4.0}, 5), ({}, 0)]) == {name: comes_to}


def test_a_mean_is_over_the_data_that_it_was_told_of() -> None:
    assert reduced([({"a:mean": 1.0}, 2), ({"b:sum": 1.0}, 7)]) == {"a:mean": 1.0, "b:sum": 1.0}
    assert math.isnan(reduced([({"a:sum": math.nan}, 1), ({"a:sum": 1.0}, 1)])["a:sum"])


def test_points_are_sent_as_many_at_a_time_as_a_message_takes() -> None:
    small = [MetricPoint(step, {"x": 1.0}) for step in range(POINTS_AT_ONCE + 1)]
    assert [len(some) for some in in_messages(small)] == [POINTS_AT_ONCE, 1]
    large = [MetricPoint(step, {f"{i:0200}": 1.0 for i in range(256)}) for step in range(10)]
    assert [point for some in in_messages(large) for point in some] == large
    assert max(map(len, in_messages(large))) * 256 * 200 < BYTES_AT_ONCE
    assert list(in_messages([])) == []
