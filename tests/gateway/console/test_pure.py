"""What pages are made of, before there is a page."""

import math
from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.gateway.console.curves import series
from lorry.gateway.console.days import by_day, by_run, in_all
from lorry.gateway.console.lineage import Line, lines
from lorry.gateway.console.listing import Wanted, listed, slice_of
from lorry.gateway.console.origins import is_own
from lorry.gateway.console.playground import likely
from lorry.wire.ids import ProjectId, RunId
from lorry.wire.lineage import Descent
from lorry.wire.metrics import SourcedPoint
from lorry.wire.types import ClientSession, TrainingRun, UsageEvent, UsageKind

HERE = "lorry.example:8000"


@pytest.mark.parametrize(
    ("headers", "is_ours"),
    [
        ({"sec-fetch-site": "same-origin", "origin": f"https://{HERE}"}, True),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "same-site", "origin": f"https://{HERE}"}, False),  # another port of this host
        ({"sec-fetch-site": "cross-site", "origin": f"https://{HERE}"}, False),
        ({"sec-fetch-site": "none"}, False),  # typed by hand, which no form is
        ({"origin": f"http://{HERE}"}, True),
        ({"origin": "http://lorry.example"}, False),
        ({"origin": "http://lorry.example:8001"}, False),
        ({"origin": f"http://evil.example/{HERE}"}, False),
        ({"origin": f"http://{HERE}@evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://["}, False),
        ({"origin": ""}, False),
        ({}, False),
    ],
)
def test_whose_page_sent_a_form(headers: dict[str, str], is_ours: bool) -> None:
    assert is_own(headers | {"host": HERE}) == is_ours


def test_without_a_host_nothing_is_ours() -> None:
    assert not is_own({"origin": "null"})
    assert not is_own({"origin": "", "host": ""})


def run(run_id: str, used_at: float = 0.0, project: str = "default", **metadata: str) -> TrainingRun:
    return TrainingRun(run_id, "jargon-1m", "alice", 8, used_at, user_metadata=metadata, project=ProjectId(project))


def session(status: str | None, *runs: str) -> ClientSession:
    return ClientSession("session-1", 0.0, "alice", [], {}, "my sweep", status, None, list(runs), [])  # type: ignore[arg-type]


def test_a_runs_state_and_name() -> None:
    runs = [run("a", 100), run("b", 99, name="baseline"), run("c", 98), run("d", -1000), run("e", 0)]
    sessions = [session("success", "a", "e"), session("active", "c")]
    found = listed(runs, sessions, {"a": 2}, now=100.0)
    assert [(each.id, each.name, each.state) for each in found] == [
        ("a", "my sweep", "waiting"),
        ("b", "baseline", "active"),
        ("c", "my sweep", "active"),
        ("e", "my sweep", "finished"),
        ("d", "d", "idle"),
    ]


def test_every_word_of_a_search_must_be_somewhere() -> None:
    (only,) = listed([run("run-1", project="vision", lr="1e-3", name="Wide ONE")], [], {}, now=0.0)
    for text in ("", "wide", "ONE lr=1e-3", "run-1 jargon vision"):
        assert Wanted(text).takes(only), text
    assert not Wanted("wide lr=1e-4").takes(only)
    assert not Wanted(project="text").takes(only)
    assert not Wanted(state="finished").takes(only)
    assert Wanted("wide", "vision", "active").takes(only)


@given(total=st.integers(0, 130), number=st.integers(-5, 10))
def test_a_slice_is_of_the_list_whatever_page_is_asked_for(total: int, number: int) -> None:
    rows = listed([run(str(i)) for i in range(total)], [], {}, 0.0)
    found = slice_of(rows, number, 50)
    assert 1 <= found.number <= found.pages
    assert list(found.rows) == rows[found.first - 1 :][: len(found.rows)] if total else not found.rows
    assert sum(len(slice_of(rows, n, 50).rows) for n in range(1, found.pages + 1)) == total


def test_lineage_is_a_tree_of_runs() -> None:
    def descent(name: str, path: str | None, parent: bool = True) -> Descent:
        return Descent(RunId(name), path, 0.0, True, "load", parent)

    found = lines(
        [
            descent("b", "tinker://a/weights/x"),
            descent("c", "tinker://b/weights/y"),
            descent("c", "tinker://z/weights/y", parent=False),
            descent("d", "tinker://elsewhere/weights/1"),
            descent("e", None),
        ]
    )
    assert found == [
        Line(0, "a", None),
        Line(1, "b", "tinker://a/weights/x"),
        Line(2, "c", "tinker://b/weights/y"),
        Line(0, "elsewhere", None),
        Line(1, "d", "tinker://elsewhere/weights/1"),
    ]
    chain = lines(descent(str(i + 1), f"tinker://{i}/weights/x") for i in range(5000))
    assert [line.depth for line in chain] == list(range(5001))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_lineage_ends_whatever_came_from_what(pairs: list[tuple[int, int]]) -> None:
    found = lines(Descent(RunId(str(a)), f"tinker://{b}/weights/x", 0.0, True, "load", True) for a, b in pairs)
    assert len(found) == len({line.run for line in found})
    assert {line.run for line in found} >= {str(run) for run, _ in pairs}


KINDS: tuple[UsageKind, ...] = ("train", "prefill", "cached_prefill", "sample")
EVENTS = st.builds(
    UsageEvent,
    hour=st.integers(0, 10**5).map(lambda hour: hour * 3600.0),
    run=st.sampled_from(["a", "b", ""]),
    session=st.none(),
    base_model=st.just("m"),
    kind=st.sampled_from([*KINDS, "storage"]),
    tokens=st.integers(0, 10**9),
    usd_per_million=st.just(1.0),
    cost_usd=st.integers(0, 1000).map(float),
    gb_hours=st.integers(0, 100).map(float),
)


@given(st.lists(EVENTS, max_size=30))
def test_days_and_runs_add_up_to_the_whole(events: list[UsageEvent]) -> None:
    whole = in_all(events)
    for parts in (by_day(events), by_run(events)):
        assert sum(part.cost_usd for part in parts.values()) == whole.cost_usd
        assert sum(part.gb_hours for part in parts.values()) == whole.gb_hours
        for kind in KINDS:
            assert sum(part.tokens[kind] for part in parts.values()) == whole.tokens[kind]
    assert list(by_day(events)) == sorted(by_day(events), reverse=True)


def test_a_day_is_one_of_utc() -> None:
    last = datetime(2026, 3, 1, 23, tzinfo=UTC).timestamp()
    event = UsageEvent(last, "a", None, "m", "train", 5, 1.0, 0.0)
    assert list(by_day([event])) == [date(2026, 3, 1)]


def test_curves_are_by_step_losses_first_and_have_no_number_for_what_is_not_finite() -> None:
    told = [
        SourcedPoint("loop", 0, 0.0, {"loss:sum": 9.0}),
        SourcedPoint("training", 0, 0.0, {"grad_norm": 1.0, "loss:sum": 2.0}),
        SourcedPoint("training", 2, 0.0, {"loss:sum": math.nan}),
    ]
    assert list(series(told).items()) == [
        ("training/loss:sum", {"steps": [0, 2], "values": [2.0, None]}),
        ("training/grad_norm", {"steps": [0], "values": [1.0]}),
        ("loop/loss:sum", {"steps": [0], "values": [9.0]}),
    ]


def test_five_classes_of_probability() -> None:
    assert [likely(chance) for chance in (1.0, 0.5, 0.49, 0.1, 0.05, 0.02, 0.01, 0.002, 0.001, 0.0)] == [
        4, 4, 3, 3, 2, 2, 1, 1, 0, 0,
    ]  # fmt: skip
