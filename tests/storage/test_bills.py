"""Bills add up to the last digit, by whatever they are grouped, and a wrong one is found."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlite_utils import Database

from lorry.cli import app
from lorry.storage.bills import By, bill, verify
from lorry.storage.connection import FILE
from lorry.storage.reports import usage
from lorry.storage.rows import CommandRow, ResultRow, UsageEntry
from lorry.storage.store import Store
from lorry.wire.client_messages import CommandArguments
from lorry.wire.ids import FutureId, KeyId, LaneId, TenantId

DAY = 86_400.0
DIMENSIONS: tuple[By, ...] = ("tenant", "key", "run", "model", "kind", "day")
ENTRIES = st.builds(
    lambda tenant, key, run, model, kind, tokens, price, day: (
        UsageEntry(FutureId(""), kind, TenantId(tenant), run, model, tokens, price, tokens * price, key),
        day * DAY + 5,
    ),
    st.sampled_from(["alice", "bob"]),
    st.sampled_from([KeyId("key-1"), KeyId("key-2"), None]),
    st.sampled_from(["run-1", "run-2"]),
    st.sampled_from(["m", "n"]),
    st.sampled_from(["train", "sample", "prefill", "cached_prefill"]),
    st.integers(1, 10**8),
    st.integers(0, 10**10),
    st.integers(0, 3),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with closing(Store(tmp_path_factory.mktemp("bills"))) as store:
        yield store


class _UndoneError(Exception):
    pass


@contextmanager
def undone(store: Store) -> Iterator[Store]:
    """Whatever is written in the block is gone after it."""
    with suppress(_UndoneError), store.transaction():
        yield store
        raise _UndoneError


def billed(store: Store, entry: UsageEntry, at: float, number: int, state: str = "done") -> None:
    """As a command that came, and was done."""
    lane = LaneId(entry.run)
    future = FutureId(f"{lane}:{number}")
    row = CommandRow(future, lane, number, "forward_backward", entry.tenant, entry.base_model, 1, 1, CommandArguments())
    store.command_accepted(replace(row, key=entry.key), b"", b"digest", at)
    store.command_finished(ResultRow(future, None, b""), state, None, [replace(entry, future=future)], at)  # type: ignore[arg-type]


def said(entry: UsageEntry, at: float, by: tuple[By, ...]) -> tuple[str, ...]:
    of: dict[By, str] = {
        "tenant": entry.tenant,
        "key": entry.key or "",
        "run": entry.run,
        "model": entry.base_model,
        "kind": entry.kind,
        "day": f"1970-01-{int(at // DAY) + 1:02d}",
    }
    return tuple(of[each] for each in by)


@given(st.lists(ENTRIES, max_size=8), st.lists(st.sampled_from(DIMENSIONS), unique=True).map(tuple), st.integers(0, 4))
def test_a_bill_is_the_sum_of_what_was_used(
    shared: Store, entries: list[tuple[UsageEntry, float]], by: tuple[By, ...], days: int
) -> None:
    with undone(shared) as store:
        expected = defaultdict[tuple[str, ...], list[int]](lambda: [0, 0])
        for number, (entry, at) in enumerate(entries):
            billed(store, entry, at, number)
            if at < days * DAY and entry.tenant == "alice":
                expected[said(entry, at, by)][0] += entry.tokens
                expected[said(entry, at, by)][1] += entry.cost
        found = bill(store, by, {"tenant": "alice"}, 0.0, days * DAY)
        assert {line.of: [line.tokens, line.cost] for line in found} == expected
        assert verify(store).findings == ()
        assert verify(store).recomputed == sum(entry.cost for entry, _ in entries)


def test_sums_do_not_overflow(tmp_path: Path) -> None:
    most = UsageEntry(FutureId(""), "train", TenantId("alice"), "run-1", "m", 9 * 10**8, 10**10, 9 * 10**18)
    with closing(Store(tmp_path)) as store:
        with store.transaction():
            for number in range(5):
                billed(store, most, 1.0, number)
        (line,) = bill(store, ())
        assert line.cost == 5 * 9 * 10**18 > 2**63
        assert f"{line.usd:f}" == "45000000.000000000000"
        assert [row.cost_usd for row in usage(store)] == [45e6]


USED = UsageEntry(FutureId(""), "train", TenantId("alice"), "run-1", "m", 10, 3, 30, KeyId("key-1"))
FAULTS: dict[str, str] = {
    "UPDATE usage SET cost = cost + 1 WHERE future = 'run-1:1'": "10 tokens at 3 were billed as 31",
    "UPDATE usage SET tokens = 11 WHERE future = 'run-1:1'": "11 tokens at 3 were billed as 30",
    "UPDATE usage SET tenant = 'bob' WHERE future = 'run-1:1'": "billed to another tenant",
    "UPDATE usage SET key = 'key-2' WHERE future = 'run-1:1'": "billed to another tenant, project, model or key",
    "UPDATE usage SET project = 'owls' WHERE future = 'run-1:1'": "billed to another tenant, project, model or key",
    "UPDATE commands SET state = 'failed' WHERE future = 'run-1:1'": "billed, and failed",
    "UPDATE usage SET future = 'run-1:9' WHERE future = 'run-1:1'": "no such command is in the journal",
    "DELETE FROM usage WHERE future = 'run-1:1'": "run-1:1: done, and not billed",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_bill_and_the_journal_disagree_about_is_found(tmp_path: Path, fault: str) -> None:
    with closing(Store(tmp_path)) as store, store.transaction():
        for number in range(3):
            billed(store, USED, 1.0, number)
    with closing(Database(tmp_path / FILE)) as database:
        database.execute(fault)
        database.conn.commit()
    with closing(Store(tmp_path)) as store:
        assert FAULTS[fault] in "; ".join(verify(store).findings)


@pytest.fixture
def asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `lorry usage` prints of two tenants' three days."""
    with closing(Store(tmp_path)) as store, store.transaction():
        for number, tenant in enumerate(["alice", "bob", "alice"]):
            entry = replace(USED, tenant=TenantId(tenant), run=f"run-{tenant}", tokens=10**6, price=440_000)
            billed(store, replace(entry, cost=440_000 * 10**6), number * DAY, number)

    def ask(*options: str) -> str:
        app(["usage", *options, "--data", str(tmp_path)], standalone_mode=False)
        return capfd.readouterr().out

    return ask


def test_usage_is_printed_for_machines(asked: Callable[..., str]) -> None:
    rows = list(csv.reader(io.StringIO(asked("--csv", "--by", "day", "--by", "tenant"))))
    assert rows[0] == ["day", "tenant", "tokens", "gb_hours", "usd"]
    assert rows[1] == ["1970-01-01", "alice", "1000000", "0.0", "0.440000000000"]
    assert len(rows) == 4
    found = json.loads(asked("--json", "--by", "tenant", "--since", "1970-01-02"))
    assert found["usage"] == [
        {"tenant": "bob", "tokens": 10**6, "gb_hours": 0.0, "usd": 0.44},
        {"tenant": "alice", "tokens": 10**6, "gb_hours": 0.0, "usd": 0.44},
    ]
    assert found["sum"] == {"tokens": 2 * 10**6, "gb_hours": 0.0, "usd": 0.88}


def test_usage_is_printed_for_people_with_its_sum(asked: Callable[..., str]) -> None:
    lines = asked("--tenant", "alice", "--by", "key").splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any("key-1" in line and "2,000,000" in line and "0.880000" in line for line in lines)
    assert any("sum" in line and "2,000,000" in line for line in lines)
    assert asked("--tenant", "nobody") == "Nothing was used.\n"
    assert asked("--until", "1970-01-01") == "Nothing was used.\n"


def test_usage_is_verified(asked: Callable[..., str]) -> None:
    assert asked("--verify") == "3 requests, 1.32 USD computed again, as they were recorded.\n"
