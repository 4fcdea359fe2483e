"""Who may come in, and for what: keys and tenants, as an administrator changes them while the broker serves."""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlite_utils import Database

import lorry
from lorry.client.connection import Connection, open_connection
from lorry.client.operator import administer
from lorry.scheduler.access.administration import carry_out, checked, is_open
from lorry.scheduler.access.permissions import NEEDED
from lorry.storage.connection import FILE
from lorry.storage.store import Store
from lorry.wire.admin_messages import (
    Administer,
    AdminOrder,
    CreateKey,
    CreateTenant,
    EndKey,
    KeyCreated,
    KeyInfo,
    ListKeys,
    ListLimits,
    ListTenants,
    RemoveTenant,
    SetLimits,
    SetTenant,
    TenantInfo,
    new_key_id,
)
from lorry.wire.catalogue_messages import (
    AuditBetween,
    DeleteCheckpoint,
    ExpireCheckpoint,
    FindRuns,
    GetMetrics,
    PublishCheckpoint,
    Query,
)
from lorry.wire.client_messages import (
    Cancel,
    CreateRun,
    CreateSampler,
    Drain,
    FromClient,
    Goodbye,
    Hello,
    ImportAdapter,
    Ping,
    Probe,
    SamplerCreated,
    Submit,
)
from lorry.wire.errors import (
    AuthenticationError,
    InvalidRequestError,
    LorryError,
    NotFoundError,
    PermissionDeniedError,
)
from lorry.wire.ids import FutureId, LaneId, TenantId, future_id
from lorry.wire.limits import SCOPES, USER_SCOPES, Limits, Scope
from lorry.wire.types import AuditEvent, LoraConfig

from .test_client_door import DATUM, Serving

ALICE, BOB = TenantId("alice"), TenantId("bob")


def key_for(store: Store, *scopes: Scope, tenant: TenantId = ALICE, expires_at: float | None = None) -> str:
    return store.create_key(tenant, time.time(), "", scopes or USER_SCOPES, expires_at)


async def refused(connection: Connection, message: object) -> LorryError:
    with pytest.raises(LorryError) as caught:
        await connection.tell(message)
    return caught.value


# What a key may do ---------------------------------------------------------------------------------------------------


def test_it_is_said_of_every_message_what_it_takes() -> None:
    assert NEEDED.keys() == set(get_args(FromClient)) - {Hello, Probe, Drain, ImportAdapter}
    assert all(set(needed) <= set(SCOPES) for needed in NEEDED.values())


async def test_a_key_does_what_its_scopes_say_and_nothing_else(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        service.may_work.set()
        lora = LoraConfig(rank=4, seed=0)
        asks: dict[Scope, Callable[[int], object]] = {
            "train": lambda n: CreateRun(n, "nonce", "m", lora),
            "sample": lambda n: CreateSampler(n, "nonce-s", base_model="m"),
            "read": FindRuns,
            "admin": lambda n: Administer(n, ListKeys()),
        }
        for scope in SCOPES:
            async with open_connection(service.address, key_for(service.store, scope)) as connection:
                open_question = Query(connection.next_request(), "capabilities")
                if scope == "metrics":
                    assert isinstance(await refused(connection, open_question), PermissionDeniedError)
                else:
                    await connection.tell(open_question)  # which all others may ask
                for needed, ask in asks.items():
                    if needed == scope:
                        await connection.tell(ask(connection.next_request()))
                    else:
                        error = await refused(connection, ask(connection.next_request()))
                        assert isinstance(error, PermissionDeniedError)
                        assert str(error).startswith(f"scope is {scope}, expected {needed} for")
                if scope in NEEDED[GetMetrics]:
                    await connection.tell(GetMetrics(connection.next_request()))
                else:
                    error = await refused(connection, GetMetrics(connection.next_request()))
                    assert str(error).startswith(f"scope is {scope}, expected admin or metrics for")


def test_who_measures_may_say_hello_and_ask_for_what_is_measured_and_nothing_else() -> None:
    assert {message for message, needed in NEEDED.items() if "metrics" in needed} == {GetMetrics, Ping, Goodbye}


async def test_who_may_not_train_leaves_no_gap_and_cancels_nothing(tmp_path: Path) -> None:
    """A command that is refused ends its place in its run's order, so who may not train must not have one."""
    async with (
        Serving(tmp_path) as service,
        lorry.connect(service.address, api_key=service.key) as owner,
        open_connection(service.address, key_for(service.store, "read", "sample")) as reader,
    ):
        training = await owner.create_lora_training_client_async("m", rank=4)
        waiting = await training.forward_backward_async([DATUM], "cross_entropy")
        lane = LaneId(training.model_id)
        stolen = reader.expect(future_id(lane, 1))
        reader.submit(Submit(reader.next_request(), lane, 1, "optim_step"), b"", stolen)
        with pytest.raises(PermissionDeniedError, match="expected train for 'optim_step'"):
            await stolen
        for disguised in ("sample", "compute_logprobs"):
            future = reader.expect(future_id(lane, 1))
            reader.submit(Submit(reader.next_request(), lane, 1, disguised), b"", future)  # type: ignore[arg-type]
            with pytest.raises(PermissionDeniedError, match=f"expected train for '{disguised}'"):
                await future
        unreadable = Submit(reader.next_request(), lane, 1, "sample", tokens=-1)
        assert isinstance(await refused(reader, unreadable), PermissionDeniedError)
        assert isinstance(
            await refused(reader, Cancel(reader.next_request(), FutureId(f"{lane}:0"))), PermissionDeniedError
        )
        service.may_work.set()
        await waiting
        await training.optim_step(lorry.AdamParams())
        assert service.states(training.model_id) == ["done", "done"]


# When it ends --------------------------------------------------------------------------------------------------------


async def test_a_revoked_key_ends_at_once_what_it_opened_and_nothing_else(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        admin, doomed = key_for(service.store, "admin", tenant=BOB), key_for(service.store)
        info = service.store.api_keys(ALICE)[-1]
        async with (
            open_connection(service.address, admin) as boss,
            lorry.connect(service.address, api_key=service.key) as other,
            lorry.connect(service.address, api_key=doomed) as client,
        ):
            training = await client.create_lora_training_client_async("m", rank=4)
            waiting = await training.forward_backward_async([DATUM], "cross_entropy")
            await boss.tell(Administer(boss.next_request(), EndKey(info.id)))
            with pytest.raises(AuthenticationError, match=f"api_key is {info.id}, which was revoked"):
                await waiting
            service.may_work.set()
            again = await other.create_lora_training_client_async("m", rank=4)
            await again.forward_backward([DATUM], "cross_entropy")
        with pytest.raises(AuthenticationError, match="was revoked"):
            async with lorry.connect(service.address, api_key=doomed):
                pass


async def test_an_administrators_key_can_end_itself_and_is_answered(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        admin = key_for(service.store, "admin", tenant=BOB)
        (own,) = service.store.api_keys(BOB)
        async with open_connection(service.address, admin) as boss:
            await boss.tell(Administer(boss.next_request(), EndKey(own.id)))
            with pytest.raises(AuthenticationError):
                await boss.tell(Administer(boss.next_request(), ListKeys()))


async def test_a_key_that_expires_ends_what_it_opened(tmp_path: Path) -> None:
    async with Serving(tmp_path, heartbeat_s=0.2) as service:
        key = key_for(service.store, expires_at=time.time() + 1.5)
        with pytest.raises(AuthenticationError, match="which expired at 20"):
            async with lorry.connect(service.address, api_key=key) as client:
                training = await client.create_lora_training_client_async("m", rank=4)
                await training.forward_backward([DATUM], "cross_entropy")  # nobody works: it would wait for ever


async def test_a_tenant_that_is_removed_is_locked_out_with_all_its_keys_and_can_be_made_again(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        keys = [key_for(service.store, tenant=BOB) for _ in range(3)]
        operator = service.config.operator_key
        await administer(service.address, None, operator, RemoveTenant(BOB))
        for key in keys:
            with pytest.raises(AuthenticationError):
                async with lorry.connect(service.address, api_key=key):
                    pass
        with pytest.raises(NotFoundError, match="there is no tenant 'bob'"):
            await administer(service.address, None, operator, SetTenant(BOB, 2.0))
        await administer(service.address, None, operator, CreateTenant(BOB))
        async with lorry.connect(service.address, api_key=key_for(service.store, tenant=BOB)) as client:
            await client.get_server_capabilities_async()


async def test_only_the_operator_or_an_administrator_changes_anything(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        with pytest.raises(InvalidRequestError, match="operator_key"):
            await administer(service.address, None, "wrong", CreateTenant(BOB))
        assert not service.store.has_tenant(BOB)


# What is recorded ----------------------------------------------------------------------------------------------------


async def test_what_was_used_is_recorded_with_its_key(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        service.may_work.set()
        async with lorry.connect(service.address, api_key=service.key) as client:
            training = await client.create_lora_training_client_async("m", rank=4)
            await training.forward_backward([DATUM], "cross_entropy")
        (key,) = service.store.api_keys()
        assert key.used_at is not None
        assert service.store.rows("SELECT DISTINCT key FROM commands") == [{"key": key.id}]


async def test_deeds_are_written_down_for_their_tenant_and_for_administrators(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        service.may_work.set()
        admin = key_for(service.store, "admin", tenant=BOB)
        (alice_key, bob_key) = (service.store.api_keys(tenant)[0].id for tenant in (ALICE, BOB))
        async with (
            open_connection(service.address, admin) as boss,
            open_connection(service.address, service.key) as mine,
            lorry.connect(service.address, api_key=service.key) as client,
        ):
            training = await client.create_lora_training_client_async("m", rank=4)
            path = (await training.save_state("kept")).path
            await training.save_weights_and_get_sampling_client_async()
            await mine.tell(PublishCheckpoint(mine.next_request(), path, True))
            await mine.tell(ExpireCheckpoint(mine.next_request(), path, 3600))
            await mine.tell(DeleteCheckpoint(mine.next_request(), path))
            with pytest.raises(NotFoundError):
                await mine.tell(DeleteCheckpoint(mine.next_request(), path))
            await boss.tell(Administer(boss.next_request(), SetTenant(BOB, 2.0)))
            seen = await mine.ask(AuditBetween(mine.next_request(), 0.0, 1e12), list[AuditEvent])
            assert [(event.event, event.by) for event in seen] == [
                ("run_created", alice_key),
                ("checkpoint_created", alice_key),
                ("checkpoint_published", alice_key),
                ("checkpoint_expiry_set", alice_key),
                ("checkpoint_deleted", alice_key),
            ]
            assert {event.subject for event in seen[1:]} == {path}
            everything = await boss.ask(AuditBetween(boss.next_request(), 0.0, 1e12), list[AuditEvent])
            assert everything[:-1] == seen
            assert (everything[-1].event, everything[-1].by) == ("tenant_weight_set", bob_key)


def test_a_tenant_sees_that_its_key_was_revoked(tmp_path: Path) -> None:
    with closing(Store(tmp_path)) as store:
        key_for(store)
        (key,) = store.api_keys()
        carried_out(store, EndKey(key.id))
        assert [(event.event, event.subject) for event in store.audit(ALICE)] == [("key_revoked", key.id)]


def test_the_audit_log_is_only_added_to(tmp_path: Path) -> None:
    with closing(Store(tmp_path)) as store:
        with store.transaction():
            store.audited(AuditEvent(1.0, ALICE, "key-1", "run_created", "run-1"))
        for change in ("UPDATE audit SET at = 2", "DELETE FROM audit"):
            with (
                closing(Database(tmp_path / FILE)) as database,
                pytest.raises(sqlite3.IntegrityError, match="only added"),
            ):
                database.execute(change)
        assert [event.at for event in store.audit()] == [1.0]
        assert store.audit(BOB) == []
        assert store.audit(kind="run") == store.audit(ALICE, 1.0, 2.0)
        assert store.audit(kind="checkpoint") == store.audit(ALICE, 0.0, 1.0) == []


def test_a_key_that_is_asked_for_twice_is_made_once(tmp_path: Path) -> None:
    with closing(Store(tmp_path)) as store:
        order = CreateKey(new_key_id(), ALICE, "laptop")
        first, second = (carried_out(store, order) for _ in range(2))
        assert isinstance(first, KeyCreated)
        assert isinstance(second, KeyCreated)
        assert first.api_key != second.api_key
        (only,) = store.api_keys()
        assert only.id == second.info.key


def test_no_key_lies_in_the_database_in_clear(tmp_path: Path) -> None:
    with closing(Store(tmp_path)) as store:
        key = key_for(store)
        store.checkpoint_wal()
    assert key.encode() not in b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


NAMES = st.text(max_size=6)
WEIGHTS = st.floats()
ORDERS = st.one_of(
    st.builds(
        CreateKey,
        st.sampled_from(["key-0123456789ab", "key-1"]) | NAMES,
        NAMES,
        NAMES,
        st.lists(st.sampled_from(SCOPES)),
        st.none() | WEIGHTS,
    ),
    st.builds(EndKey, st.sampled_from(["key-0123456789ab", "x"])),
    st.builds(CreateTenant, NAMES, WEIGHTS),
    st.builds(SetTenant, NAMES, WEIGHTS),
    st.builds(RemoveTenant, NAMES),
    st.builds(ListKeys, st.none() | NAMES),
    st.builds(
        SetLimits,
        st.sampled_from(["everyone", "tenant:", "key:key-0123456789ab", "x"]),
        st.builds(Limits, runs=st.none() | st.integers(-1, 2**60), requests_per_s=st.none() | WEIGHTS),
    ),
    st.builds(ListLimits),
    st.builds(ListTenants),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("orders"))


@given(st.lists(ORDERS, max_size=8))
def test_any_order_is_carried_out_or_refused_and_a_refused_one_changes_nothing(
    shared: Store, orders: list[AdminOrder]
) -> None:
    for order in orders:
        before = (shared.api_keys(), shared.tenants())
        try:
            carried_out(shared, order)
        except LorryError as error:
            assert error.field is not None
            assert (shared.api_keys(), shared.tenants()) == before
    keys, tenants = carried_out(shared, ListKeys()), carried_out(shared, ListTenants())
    assert isinstance(keys, list)
    assert isinstance(tenants, list)
    gone = {tenant.tenant for tenant in tenants if isinstance(tenant, TenantInfo) and tenant.removed_at is not None}
    for key in shared.api_keys():
        assert not (is_open(key, 10.0) and key.tenant in gone)
    assert all(isinstance(key, KeyInfo) and key.scopes for key in keys)
    assert all(0 < tenant.weight < float("inf") for tenant in shared.tenants())


def carried_out(store: Store, order: AdminOrder) -> object:
    with store.transaction():
        carried = carry_out(store, checked(order, 10.0), 10.0, "somebody")
    if isinstance(carried, LorryError):
        raise carried
    return carried.answer


async def test_what_was_asked_for_with_a_key_that_is_revoked_ends_and_the_others_go_on(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        operator, rows = service.config.operator_key, 64  # what the scripted actor samples at the same time
        mine = service.store.create_key(ALICE, 1.0, "laptop")
        (id_,) = [key.id for key in service.store.api_keys(ALICE) if key.name == "laptop"]
        async with open_connection(service.address, service.key) as other:
            lane = LaneId((await other.ask(CreateSampler(1, "n", base_model="m"), SamplerCreated)).sampler)
            for seq in range(rows):
                other.submit(Submit(other.next_request(), lane, seq, "sample"), b"", other.expect(future_id(lane, seq)))
            async with open_connection(service.address, mine) as laptop:
                for seq in range(rows, rows + 3):
                    asked = Submit(laptop.next_request(), lane, seq, "sample")
                    await laptop.submit(asked, b"", laptop.expect(future_id(lane, seq))).wait()
                behind = other.expect(future_id(lane, rows + 3))
                other.submit(Submit(other.next_request(), lane, rows + 3, "sample"), b"", behind)
                await administer(service.address, None, operator, EndKey(id_))
            for seq in range(rows, rows + 3):
                with pytest.raises(AuthenticationError, match=f"api_key is {id_} .laptop., which was revoked"):
                    await other.watch(future_id(lane, seq))
            service.may_work.set()
            await behind
        assert service.states(lane) == [*["done"] * rows, *["failed"] * 3, "done"]
