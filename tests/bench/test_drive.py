"""Requests are sent when they are due, whatever the server makes of those before, and none is forgotten."""

import pytest

from lorry.bench.figures import figures_of
from lorry.bench.records import Record
from lorry.bench.workload import Burst, Closed, Poisson, Sample, Tenant, Train, Workload

from .stub import Stub, driven

TRAIN = [Train(rows=2, tokens=10)]


def workload(*tenants: Tenant, seconds: float = 10, warm_up_s: float = 0) -> Workload:
    return Workload("w", "m", list(tenants), warm_up_s=warm_up_s, duration_s=seconds)


def test_a_closed_loop_has_so_many_under_way_and_thinks_between_them() -> None:
    tenant = Tenant("a", TRAIN, Closed(concurrency=2, think_s=1, ramp_up_s=4))
    records = driven(workload(tenant), Stub(lambda name, n: 1.0))
    assert [record.due_s for record in records] == [0, 2, 2, 4, 4, 6, 6, 8, 8]
    assert {record.done_s - record.due_s for record in records} == {1.0}
    assert {record.tokens for record in records} == {20}
    assert sorted(record.number for record in records) == list(range(9))


def test_an_open_loop_does_not_wait_for_a_server_that_stalls() -> None:
    """Coordinated omission: one request of 5 s before many of 0.1 s would hide what those that were due meanwhile
    met, if they were sent, or timed, when it ended."""
    tenant = Tenant("a", TRAIN, Burst(size=1, every_s=0.5))
    records = driven(workload(tenant), Stub(lambda name, n: 5.0 if n == 1 else 0.1, at_once=1))
    by_number = sorted(records, key=lambda record: record.number)
    assert [record.due_s for record in by_number] == pytest.approx([0.5 * i for i in range(20)])
    assert [record.sent_s for record in by_number] == pytest.approx([record.due_s for record in by_number])
    # Request i is served i-th: it ends 0.1 s i after the stall, or 0.1 s after it was due.
    ends = [5.0]
    for i in range(1, 20):
        ends.append(max(ends[-1], 0.5 * i) + 0.1)
    assert [record.latency_s for record in by_number] == pytest.approx([end - 0.5 * i for i, end in enumerate(ends)])
    latency = figures_of(workload(tenant), records).by_kind["train"].latency_s
    assert latency is not None and latency.p50 > 1.0, "half of all requests were due within the stall or its wake"


def test_poisson_arrivals_are_those_of_the_seed_whatever_the_server() -> None:
    tenant = Tenant("a", TRAIN, Poisson(rate_per_s=5, ramp_up_s=2), count=2)
    fast, slow = (driven(workload(tenant, seconds=40), Stub(lambda name, n, s=s: s)) for s in (0.01, 7.0))

    def due(records: list[Record]) -> list[tuple[str, int, float]]:
        return sorted((record.tenant, record.number, round(record.due_s, 9)) for record in records)

    assert due(fast) == due(slow)
    assert {name for name, _, _ in due(fast)} == {"a-0", "a-1"}


def test_what_fails_or_is_not_answered_is_counted_and_the_others_go_on() -> None:
    def takes(name: str, n: int) -> float | None:
        return None if name == "b" and n % 2 else 1000.0 if n == 5 else 1.0

    tenants = [Tenant("a", TRAIN, Closed()), Tenant("b", TRAIN, Closed())]
    records = driven(workload(*tenants), Stub(takes), patience_s=30)
    errors = [(record.tenant, record.number, record.error) for record in records if record.error]
    assert ("a", 4, "not answered in time") in errors
    assert [error for error in errors if error[0] == "b"] == [
        ("b", n, "Refused") for n in range(0, errors_of(records), 2)
    ]
    assert next(record.message for record in records if record.error == "Refused") == "come later"
    assert max(record.done_s for record in records) == 40


def errors_of(records: list[Record]) -> int:
    return max(record.number for record in records if record.tenant == "b") + 1


def test_tokens_and_acknowledgements_are_timed() -> None:
    tenant = Tenant("a", [Sample(prompt_tokens=7), Train()], Closed())
    records = driven(workload(tenant, seconds=30), Stub(lambda name, n: 2.0))
    for record in records:
        if record.kind == "sample":
            assert [time - record.due_s for time in record.token_s] == pytest.approx([2.0, 2.25, 2.5])
            assert (record.tokens, record.prompt_tokens, record.acknowledged_s) == (3, 7, None)
        else:
            assert record.acknowledged_s == record.due_s
    run = figures_of(workload(tenant, seconds=30), records)
    first, between = run.by_kind["sample"].first_token_s, run.by_kind["sample"].between_tokens_s
    assert first is not None and first.p99 == pytest.approx(2.0)
    assert between is not None and between.most == pytest.approx(0.25)
