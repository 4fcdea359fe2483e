"""What is kept is billed from when it was saved until its name is gone, to the last digit, however it is divided."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.scheduler.accepting import kept_costs
from lorry.scheduler.planning.limits import LimitReachedError, Meters, holders_of, tenant_holder
from lorry.scheduler.planning.prices import parse_prices
from lorry.storage.bills import bill_with_storage, verify
from lorry.storage.kept import By
from lorry.storage.reports import usage_between
from lorry.storage.rows import CheckpointRow, RunRow
from lorry.storage.store import Store
from lorry.wire.errors import InvalidRequestError
from lorry.wire.ids import KeyId, ProjectId, RunId, TenantId
from lorry.wire.limits import Limits
from lorry.wire.types import LoraConfig

ALICE, GB, MONTH_S = TenantId("alice"), 10**9, 720 * 3600
RUN = RunRow(RunId("run-1"), ALICE, "n", "m", LoraConfig(rank=4, seed=0), {}, 1.0, 1.0, key=KeyId("key-1"))
SAVED = CheckpointRow("tinker://run-1/weights/a", RUN.id, ALICE, "training", "a", "f", 0, GB, "", 100.0, None)
BY: tuple[By, ...] = ("tenant", "project", "key", "run", "model", "kind", "day", "hour")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path)) as store:
        with store.transaction():
            store.tenant_made(ALICE, 1.0)
            store.run_created(replace(RUN, project=ProjectId("birds")))
            store.storage_priced(parse_prices("storage_usd_per_gb_month = 0.5").storage, 0.0)
        yield store


def saved(store: Store, checkpoint: CheckpointRow = SAVED, **changes: object) -> CheckpointRow:
    made = replace(checkpoint, **changes)  # type: ignore[arg-type]
    with store.transaction():
        store.checkpoint_saved(made)
    return made


def cost(store: Store, now: float, **between: float) -> int:
    return sum(kept.cost for kept in store.kept((), now, **between))  # type: ignore[arg-type]


def test_a_gigabyte_kept_for_a_month_costs_what_the_list_says(store: Store) -> None:
    saved(store)
    assert cost(store, 100.0) == 0
    assert cost(store, 100.0 + MONTH_S) == 500_000 * 10**6, "half a dollar, in millionths of a micro-dollar"
    (line,) = bill_with_storage(store, ("tenant", "project", "kind"), {}, 100.0 + MONTH_S)
    assert (line.of, line.tokens, f"{line.usd:f}", line.gb_hours) == (
        ("alice", "birds", "storage"),
        0,
        "0.500000000000",
        720,
    )


def test_it_ends_when_its_name_goes_when_it_expires_and_when_another_takes_its_name(store: Store) -> None:
    deleted = saved(store, path="tinker://deleted")
    expired = saved(store, path="tinker://expired", expires_at=150.0)
    saved(store)
    saved(store, folder="g", created_at=200.0, size_bytes=2 * GB)
    saved(store, path="tinker://run-1/sampler_weights/_1", ephemeral=True)
    with store.transaction():
        store.checkpoint_deleted(deleted, 160.0)
        store.checkpoint_deleted(expired, 700.0)
        store.checkpoint_deleted(deleted, 800.0)
    rows = store.rows("SELECT path, since, until, bytes FROM stored ORDER BY path, since")
    assert [tuple(row.values()) for row in rows] == [
        ("tinker://deleted", 100.0, 160.0, GB),
        ("tinker://expired", 100.0, 150.0, GB),
        ("tinker://run-1/weights/a", 100.0, 200.0, GB),
        ("tinker://run-1/weights/a", 200.0, None, 2 * GB),
    ]
    assert not store.storage_findings()


def test_weights_without_a_name_that_are_given_an_end_are_kept_from_then_on(store: Store) -> None:
    unnamed = saved(store, ephemeral=True)
    with store.transaction():
        assert store.checkpoint_changed(replace(unnamed, ephemeral=False, expires_at=900.0), 300.0)
        assert store.checkpoint_changed(replace(unnamed, ephemeral=False, public=True), 400.0)
    assert store.rows("SELECT since, until FROM stored") == [{"since": 300.0, "until": None}]


def test_a_new_price_holds_from_when_the_broker_has_it(store: Store) -> None:
    saved(store)
    for _ in range(2):  # a restart with the same list changes nothing
        with store.transaction():
            store.storage_priced(2_000_000, 100.0 + MONTH_S)
    assert cost(store, 100.0 + 2 * MONTH_S) == 500_000 * 10**6 + 2_000_000 * 10**6
    assert len(store.rows("SELECT 1 FROM stored")) == 2
    assert not store.storage_findings()


@given(
    kept=st.lists(
        st.tuples(st.integers(1, 10**13), st.floats(0, 5e5), st.floats(0, 5e5), st.integers(0, 10**10)),
        min_size=1,
        max_size=6,
    ),
    by=st.lists(st.sampled_from(BY), unique=True, max_size=3),
    cut=st.floats(0, 5e5),
)
def test_parts_add_up_to_the_whole(
    kept: list[tuple[int, float, float, int]], by: list[By], cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with closing(Store(tmp_path_factory.mktemp("kept"))) as store:
        exact = Fraction(0)
        with store.transaction():
            store.tenant_made(ALICE, 1.0)
            store.run_created(RUN)
            for number, (size, since, lasts, price) in enumerate(kept):
                store.storage_priced(price, since)
                store._db.execute("DELETE FROM stored WHERE until IS NOT NULL AND until = since")  # pyright: ignore[reportPrivateUsage]
                one = replace(SAVED, path=f"tinker://{number}", size_bytes=size, created_at=since)
                store.checkpoint_saved(one)
                store.checkpoint_deleted(one, since + lasts)
                us = round((since + lasts) * 1e6) - round(since * 1e6)
                exact += Fraction(price * 10**6 * size * us, GB * MONTH_S * 10**6)
        now = 2e6
        whole = cost(store, now)
        assert whole <= exact < whole + len(kept), "rounded down, once for each interval"
        assert sum(each.cost for each in store.kept(by, now)) == whole
        assert cost(store, now, end=cut) + cost(store, now, start=cut) == whole
        assert not store.storage_findings()


OTHER = "run, tenant, project, key, base_model, bytes, price, 150"
FAULTS = {
    "UPDATE stored SET until = 200": "kept, and no interval says so",
    "UPDATE stored SET bytes = 1": "kept, and no interval says so",
    "DELETE FROM checkpoints": "billed as kept, and gone",
    f"INSERT INTO stored SELECT 9, path, {OTHER}, NULL, NULL FROM stored": "billed twice",
    f"INSERT INTO stored SELECT 9, 'x', {OTHER}, 140, NULL FROM stored": "billed from 150.0 until 140.0",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_bill_and_the_checkpoints_disagree_about_is_found(store: Store, fault: str) -> None:
    saved(store)
    assert verify(store).findings == ()
    with store.transaction():
        store._db.execute(fault)  # pyright: ignore[reportPrivateUsage]
    assert FAULTS[fault] in "; ".join(verify(store).findings)


def test_it_is_told_by_the_hour_and_counts_for_the_months_limit(store: Store) -> None:
    began = datetime(2026, 9, 1, tzinfo=UTC).timestamp()
    saved(store, created_at=began - 1800, size_bytes=1000 * GB)
    events = usage_between(store, ALICE, began - 3600, began + 7200, began + 3600)
    assert [(event.hour - began, event.kind, event.gb_hours, event.project) for event in events] == [
        (-3600, "storage", 500.0, "birds"),
        (0, "storage", 1000.0, "birds"),
    ]
    assert [event.cost_usd for event in events] == [pytest.approx(0.5 * h / 720) for h in (500, 1000)]
    meters, now = Meters(), began + 3600
    meters.set(tenant_holder(ALICE), Limits(monthly_usd=0.6))
    holders = holders_of(ALICE, RUN.key, ProjectId("birds"))
    meters.kept(kept_costs(store, now), now)
    with pytest.raises(LimitReachedError, match=r"monthly_usd is 0\.694444, the limit of tenant:alice is 0\.600000"):
        meters.check_spend(holders, now)
    meters.check_spend(holders, now + 32 * 86400)


def test_what_expired_was_kept_until_then_whoever_finds_out_when(store: Store) -> None:
    saved(store, expires_at=100.0 + MONTH_S)
    saved(store, path="tinker://b", expires_at=None)
    assert cost(store, 100.0 + 5 * MONTH_S) == (1 + 5) * 500_000 * 10**6, "before anybody swept"
    with store.transaction():
        store.storage_priced(2_000_000, 100.0 + 5 * MONTH_S)  # at a start, after a while of standing still
    assert cost(store, 100.0 + 6 * MONTH_S) == (1 + 5) * 500_000 * 10**6 + 2_000_000 * 10**6
    changed = saved(store, path="tinker://c", created_at=200.0, expires_at=300.0)
    with store.transaction():
        store.checkpoint_changed(changed, 250.0)
    assert store.rows("SELECT until FROM stored WHERE path = 'tinker://c'") == [{"until": None}]


def test_a_clock_that_goes_back_makes_no_bill_wrong(store: Store) -> None:
    saved(store, created_at=1000.0)
    with store.transaction():
        store.storage_priced(7, 900.0)
        store.session_assigned("nobody", ProjectId("x"), 800.0)
    assert not store.storage_findings()
    assert cost(store, 900.0) == 0


def test_what_is_kept_moves_to_a_sessions_new_project_and_what_it_cost_stays(store: Store) -> None:
    with store.transaction():
        store.run_created(replace(RUN, id=RunId("session-1:train:0"), nonce="2", session="session-1"))
    saved(store, run=RunId("session-1:train:0"), created_at=0.0)
    with store.transaction():
        store.session_assigned("session-1", ProjectId("owls"), 1.0 * MONTH_S)
    lines = {kept.of[0]: kept.cost for kept in store.kept(("project",), 3.0 * MONTH_S)}
    assert lines == {"default": 500_000 * 10**6, "owls": 2 * 500_000 * 10**6}
    assert not store.storage_findings()


@pytest.mark.parametrize("wrong", ["-1", "nan", "1e5", "'x'"])
def test_a_price_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidRequestError, match="prices"):
        parse_prices(f"storage_usd_per_gb_month = {wrong}")
