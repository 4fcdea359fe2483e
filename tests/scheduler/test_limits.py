"""Every limit: what is said where it is reached, that it ends when it should, and that nobody else is touched."""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorry
from lorry.client.connection import open_connection
from lorry.client.futures import Future
from lorry.client.operator import administer
from lorry.scheduler.planning.lanes import Command
from lorry.scheduler.planning.limits import (
    ACTIVE_S,
    EVERYONE,
    Holder,
    Meters,
    holders_of,
    month_began,
    month_of,
    tenant_holder,
)
from lorry.scheduler.planning.planner import Planner
from lorry.scheduler.planning.prices import parse_prices
from lorry.storage.rows import CommandRow, ResultRow, UsageEntry
from lorry.wire.actor_messages import Capacity
from lorry.wire.admin_messages import SetLimits
from lorry.wire.catalogue_messages import FutureState, Query, QueueState
from lorry.wire.client_messages import CommandArguments, CreateRun, CreateSampler, RunCreated, SamplerCreated, Submit
from lorry.wire.errors import LimitReachedError, NotFoundError, TooManyWaitingError
from lorry.wire.ids import ActorId, FutureId, KeyId, LaneId, TenantId, future_id
from lorry.wire.limits import Limits
from lorry.wire.model_input import ModelInput
from lorry.wire.types import LoraConfig, SamplingParams

from .test_client_door import DATUM, Serving

ALICE, BOB, KEY = TenantId("alice"), TenantId("bob"), KeyId("key-1")
MINE, RUN = holders_of(ALICE, KEY), LaneId("run-1")
NOW = 1_790_000_000.0  # in September 2026


def limited(**limits: object) -> Meters:
    meters = Meters()
    meters.set(tenant_holder(ALICE), Limits(**limits))  # type: ignore[arg-type]
    return meters


# By itself ------------------------------------------------------------------------------------------------------------


def test_a_tenants_own_limits_take_the_place_of_everyones_one_by_one() -> None:
    meters = limited(runs=5)
    meters.set(EVERYONE, Limits(runs=1, rank=8))
    assert meters.limits(tenant_holder(ALICE)) == Limits(runs=5, rank=8)
    assert meters.limits(tenant_holder(BOB)) == Limits(runs=1, rank=8)
    assert meters.limits(Holder("key:key-1")) == Limits(), "a key has its own alone"


@given(st.floats(0.1, 50), st.lists(st.floats(0, 3), min_size=1, max_size=60))
def test_requests_come_at_their_rate_and_who_waits_as_long_as_was_said_gets_in(
    rate: float, pauses: list[float]
) -> None:
    meters, now = limited(requests_per_s=rate), NOW
    for came, pause in enumerate(pauses, 1):
        now += pause
        try:
            meters.check_pace(MINE, now)
        except TooManyWaitingError as error:
            assert error.after_s is not None
            assert 0 < error.after_s <= 1 / rate + 1e-6
            now += error.after_s + 1e-6
            meters.check_pace(MINE, now)
        assert came <= max(1.0, 2 * rate) + rate * (now - NOW) + 1 + 1e-3


@given(st.integers(1, 100), st.lists(st.tuples(st.booleans(), st.integers(1, 150)), max_size=40))
def test_what_waits_never_exceeds_the_limit_and_somebody_always_gets_in(
    most: int, steps: list[tuple[bool, int]]
) -> None:
    meters = limited(queued_tokens=most)
    waiting: list[int] = []
    for ends, tokens in steps:
        if ends and waiting:
            meters.closed(MINE, RUN, waiting.pop())
            continue
        if tokens > most:
            with pytest.raises(LimitReachedError, match=f"queued_tokens is {tokens} of one request, the limit of ten"):
                meters.check_size(MINE, tokens, 0)
            continue
        try:
            meters.check_queue(MINE, tokens, lambda _: True)
        except TooManyWaitingError as error:
            assert waiting
            assert f"the limit of tenant:alice is {most}" in str(error)
        else:
            meters.opened(MINE, RUN, tokens)
            waiting.append(tokens)
        assert sum(waiting) <= most


def test_what_waits_where_nothing_goes_on_holds_nobody_up() -> None:
    meters = limited(queued_tokens=10)
    meters.opened(MINE, RUN, 10)
    with pytest.raises(TooManyWaitingError):
        meters.check_queue(MINE, 1, lambda lane: lane == RUN)
    meters.check_queue(MINE, 1, lambda _: False)


def test_a_pace_that_is_lifted_and_set_again_begins_anew() -> None:
    meters = limited(requests_per_s=1)
    for _ in range(2):
        meters.check_pace(MINE, NOW)
    meters.set(tenant_holder(ALICE), Limits())
    for number in range(10_000):
        meters.check_pace(MINE, NOW + number / 100)
    meters.set(tenant_holder(ALICE), Limits(requests_per_s=1))
    meters.check_pace(MINE, NOW + 101)


def test_those_that_come_too_fast_are_told_to_come_again_one_after_the_other() -> None:
    meters, told = limited(requests_per_s=2), []
    for _ in range(10):
        try:
            meters.check_pace(MINE, NOW)
        except TooManyWaitingError as error:
            told.append(error.after_s)
    assert told == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])


def test_nobody_is_told_to_sleep_through_a_limit_that_is_lifted() -> None:
    meters = limited(requests_per_s=0.001)
    meters.check_pace(MINE, NOW)
    for _ in range(5):
        with pytest.raises(TooManyWaitingError) as refused:
            meters.check_pace(MINE, NOW)
        assert refused.value.after_s == 60.0
    meters.set(tenant_holder(ALICE), Limits(requests_per_s=1))
    for _ in range(2):
        meters.check_pace(MINE, NOW + 2)
    with pytest.raises(TooManyWaitingError) as refused:
        meters.check_pace(MINE, NOW + 2)
    assert refused.value.after_s == pytest.approx(1.0)


def test_a_large_sample_is_not_overtaken_for_ever() -> None:
    planner = Planner()
    planner.add_actor(ActorId("a"), "m", Capacity(slots=8, token_budget=100, sample_rows=1000, max_rank=8))
    planner.meters.set(tenant_holder(ALICE), Limits(concurrent_samples=4))

    def submit(number: int, rows: int) -> None:
        holders = holders_of(ALICE, None)
        future = FutureId(f"s:{number}")
        planner.submit(Command(future, LaneId("s"), number, "sample", ALICE, "m", 1, rows, holders=holders))

    for number, rows in enumerate([1, 1, 4, 1, 1]):
        submit(number, rows)
    order: list[str] = []
    while plan := planner.next_micro_batch(ActorId("a")):
        for command in plan.commands:
            order.append(command.future)
            planner.complete(command.future, plan.batch, 1)
    assert order == ["s:0", "s:1", "s:2", "s:3", "s:4"]


def test_money_is_counted_by_the_calendar_month() -> None:
    meters = limited(monthly_usd=10)
    meters.spent(MINE, 10**13 - 1, NOW)
    meters.check_spend(MINE, NOW)
    meters.spent(MINE, 1, NOW)
    with pytest.raises(
        LimitReachedError, match=r"monthly_usd is 10\.000000, the limit .* is 10\.000000\. .*2026-10-01 is the"
    ):
        meters.check_spend(MINE, NOW)
    meters.check_spend(holders_of(BOB, None), NOW)
    meters.check_spend(MINE, NOW + 30 * 86400)
    assert month_of(month_began(NOW)) == month_of(NOW) != month_of(month_began(NOW) - 1)


def test_a_run_counts_for_an_hour_after_its_last_request() -> None:
    meters = limited(runs=2)
    for run in range(2):
        meters.check_run(MINE, 4, "m", NOW + run)
        meters.used(MINE, LaneId(f"run-{run}"), NOW + run)
    with pytest.raises(LimitReachedError, match=r"runs is 2, the limit .* is 2\. .* the next place is free at 2026-09"):
        meters.check_run(MINE, 4, "m", NOW + 2)
    meters.check_run(MINE, 4, "m", NOW + ACTIVE_S)


def test_who_comes_near_to_a_limit_is_told_of_once_until_it_is_below() -> None:
    meters = limited(stored_bytes=100)
    holder = tenant_holder(ALICE)
    for stored in (10, 79, 80, 90, 99):
        meters.check_stored(MINE, {holder: stored})
    assert meters.near() == [(holder, "stored_bytes is 80 of 100")]
    for stored in (50, 85):
        meters.check_stored(MINE, {holder: stored})
    assert meters.near() == [(holder, "stored_bytes is 85 of 100")]


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from([ALICE, BOB]), st.integers(1, 6)), max_size=25),
    st.lists(st.integers(0, 5), max_size=60),
)
def test_no_more_is_sampled_at_once_than_may_be_and_nobody_else_waits_for_that(
    most: int, asked: list[tuple[TenantId, int]], ends: list[int]
) -> None:
    planner = Planner()
    planner.add_actor(ActorId("a"), "m", Capacity(slots=8, token_budget=100, sample_rows=1000, max_rank=8))
    planner.meters.set(tenant_holder(ALICE), Limits(concurrent_samples=most))
    for number, (tenant, rows) in enumerate(asked):
        rows = min(rows, most) if tenant == ALICE else rows
        future, holders = FutureId(f"s:{number}"), holders_of(tenant, None)
        planner.submit(Command(future, LaneId("s"), number, "sample", tenant, "m", 1, rows, holders=holders))
    under_way: dict[FutureId, tuple[Command, object]] = {}
    left = len(asked)
    for end in [*ends, *([0] * 2 * left)]:
        while plan := planner.next_micro_batch(ActorId("a")):
            for command in plan.commands:
                under_way[command.future] = command, plan.batch
                left -= 1
        assert sum(c.rows for c, _ in under_way.values() if c.tenant == ALICE) <= most
        waits = [n for n in range(len(asked)) if planner.held_back_by(FutureId(f"s:{n}"), "m") is not None]
        assert all(asked[n][0] == ALICE for n in waits)
        assert len(waits) == left, "who waits, waits for a limit: there is room for everybody else"
        if under_way:
            future = list(under_way)[end % len(under_way)]
            command, batch = under_way.pop(future)
            planner.complete(command.future, batch, 1)  # type: ignore[arg-type]
    assert left == 0
    assert not under_way


# With a broker and Lorry's own client --------------------------------------------------------------------------------


@asynccontextmanager
async def limits_of(tmp_path: Path, holder: str = "tenant:alice", **limits: object) -> AsyncGenerator[Serving]:
    async with Serving(tmp_path, heartbeat_s=0.5) as service:
        order = SetLimits(holder, Limits(**limits))  # type: ignore[arg-type]
        await administer(service.address, None, service.config.operator_key, order)
        yield service


async def lift(service: Serving) -> None:
    await administer(service.address, None, service.config.operator_key, SetLimits("tenant:alice", Limits()))


async def test_what_a_run_may_be_is_said_when_it_is_made(tmp_path: Path) -> None:
    async with limits_of(tmp_path, runs=1, rank=8, models=["m"]) as service:
        other = service.store.create_key(BOB, 1.0)
        async with lorry.connect(service.address, api_key=service.key) as client:
            with pytest.raises(LimitReachedError, match=r"rank is 16, the limit of tenant:alice is 8\. Make an"):
                await client.create_lora_training_client_async("m", rank=16)
            await client.create_lora_training_client_async("m", rank=8)
            with pytest.raises(LimitReachedError, match="runs is 1, the limit of tenant:alice is 1"):
                await client.create_lora_training_client_async("m", rank=8)
            await lift(service)
            await client.create_lora_training_client_async("m", rank=16)
        async with lorry.connect(service.address, api_key=other) as client:
            await client.create_lora_training_client_async("m", rank=64)


async def test_a_model_that_may_not_be_used_is_neither_trained_nor_sampled(tmp_path: Path) -> None:
    async with (
        limits_of(tmp_path, holder="everyone", models=["n"]) as service,
        lorry.connect(service.address, api_key=service.key) as client,
    ):
        for make in (
            lambda: client.create_lora_training_client_async("m", rank=4),
            lambda: client.create_sampling_client_async(base_model="m"),
        ):
            with pytest.raises(LimitReachedError, match=r"models is 'm', the limit of tenant:alice is n\."):
                await make()


async def test_what_is_beyond_the_queue_waits_and_then_goes_on_in_order(tmp_path: Path) -> None:
    async with (
        limits_of(tmp_path, queued_tokens=12) as service,
        lorry.connect(service.address, api_key=service.key) as client,
    ):
        training = await client.create_lora_training_client_async("m", rank=4)
        futures = [training.forward_backward([DATUM], "cross_entropy") for _ in range(12)]
        service.may_work.set()
        for future in futures:
            await future
        assert service.states(training.model_id) == ["done"] * 12


async def test_the_parts_of_a_large_call_come_in_before_its_first_and_all_goes_on(tmp_path: Path) -> None:
    """The official SDK sends the first part of a large call when all others were accepted."""
    async with (
        limits_of(tmp_path, queued_tokens=12) as service,
        open_connection(service.address, service.key) as alice,
    ):
        service.may_work.set()
        create = CreateRun(alice.next_request(), "nonce", "m", LoraConfig(rank=4, seed=0))
        lane = LaneId((await alice.ask(create, RunCreated)).run)

        def step(seq: int, tokens: int = 5) -> Future[bytes]:
            future = alice.expect(future_id(lane, seq))
            alice.submit(Submit(alice.next_request(), lane, seq, "optim_step", tokens), b"", future)
            return future

        later = [step(seq) for seq in range(1, 8)]
        while len(service.states(lane)) < 7:  # noqa: ASYNC110  the journal rings no bell
            await anyio.sleep(0.01)
        for future in [step(0), *later]:
            await future
        assert service.states(lane) == ["done"] * 8


async def test_what_a_program_that_died_left_behind_a_gap_holds_nobody_up(tmp_path: Path) -> None:
    async with (
        limits_of(tmp_path, queued_tokens=12) as service,
        open_connection(service.address, service.key) as alice,
        lorry.connect(service.address, api_key=service.key) as client,
    ):
        service.may_work.set()
        create = CreateRun(alice.next_request(), "nonce", "m", LoraConfig(rank=4, seed=0))
        lane = LaneId((await alice.ask(create, RunCreated)).run)
        for seq in range(1, 6):
            alice.submit(
                Submit(alice.next_request(), lane, seq, "optim_step", 5), b"", alice.expect(future_id(lane, seq))
            )
        training = await client.create_lora_training_client_async("m", rank=4)
        futures = [training.forward_backward([DATUM], "cross_entropy") for _ in range(6)]
        for future in futures:
            await future


async def test_sampling_takes_no_place_of_a_run(tmp_path: Path) -> None:
    async with limits_of(tmp_path, runs=1) as service, lorry.connect(service.address, api_key=service.key) as client:
        service.may_work.set()
        prompt, params = ModelInput.from_ints([1]), SamplingParams(max_tokens=1, stop=[])
        for _ in range(2):
            sampler = await client.create_sampling_client_async(base_model="m")
            await sampler.sample_async(prompt, 1, params)
        await client.create_lora_training_client_async("m", rank=4)


async def test_a_request_that_is_too_large_for_the_queue_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    async with limits_of(tmp_path, queued_tokens=2) as service:
        service.may_work.set()
        async with lorry.connect(service.address, api_key=service.key) as client:
            training = await client.create_lora_training_client_async("m", rank=4)
            with pytest.raises(
                LimitReachedError, match=r"queued_tokens is \d+ of one request, the limit .* is 2\. Send"
            ):
                await training.forward_backward([DATUM] * 40, "cross_entropy")
            await lift(service)
            await training.forward_backward([DATUM] * 40, "cross_entropy")


async def test_what_comes_too_fast_comes_again_when_it_may(tmp_path: Path) -> None:
    async with limits_of(tmp_path, requests_per_s=20.0) as service:
        service.may_work.set()
        async with lorry.connect(service.address, api_key=service.key) as client:
            training = await client.create_lora_training_client_async("m", rank=4)
            futures = [training.forward_backward([DATUM], "cross_entropy") for _ in range(60)]
            started = time.time()
            for future in futures:
                await future
            assert time.time() - started > (60 - 2 * 20) / 20 - 0.5, "a slow machine takes longer"
            assert service.states(training.model_id) == ["done"] * 60


async def test_what_comes_too_fast_and_is_cancelled_meanwhile_leaves_no_gap(tmp_path: Path) -> None:
    async with limits_of(tmp_path, requests_per_s=1.0) as service:
        service.may_work.set()
        async with lorry.connect(service.address, api_key=service.key) as client:
            training = await client.create_lora_training_client_async("m", rank=4)
            futures = [training.forward_backward([DATUM], "cross_entropy") for _ in range(4)]
            await futures[2].cancel()
            await lift(service)
            for number, future in enumerate(futures):
                if number != 2:
                    await future
            with pytest.raises(lorry.CommandCancelledError):
                await futures[2]


async def test_samples_beyond_the_limit_wait_and_are_told_why(tmp_path: Path) -> None:
    async with (
        limits_of(tmp_path, concurrent_samples=2) as service,
        open_connection(service.address, service.key) as alice,
    ):
        create = CreateSampler(alice.next_request(), "nonce", base_model="m")
        lane = LaneId((await alice.ask(create, SamplerCreated)).sampler)

        def sample(seq: int, rows: int) -> Future[bytes]:
            future = alice.expect(future_id(lane, seq))
            alice.submit(Submit(alice.next_request(), lane, seq, "sample", rows=rows), b"", future)
            return future

        with pytest.raises(LimitReachedError, match=r"concurrent_samples is 3 of one request, the limit .* is 2\."):
            await sample(0, 3)
        futures = [sample(seq, 1) for seq in range(1, 5)]
        await alice.tell(Query(alice.next_request(), "capabilities"))
        while len(service.states(lane)) < 5:  # noqa: ASYNC110  the journal rings no bell
            await anyio.sleep(0.01)
        question = QueueState(alice.next_request(), futures[-1].id)
        state = await alice.ask(question, FutureState)
        asks = f"{futures[2].id} asks for 1 more"
        told = f"concurrent_samples is 2, and {asks}; the limit of tenant:alice is 2"
        assert state == FutureState("paused_rate_limit", told)
        service.may_work.set()
        for future in futures:
            await future


async def test_a_month_that_is_spent_refuses_work_and_counts_across_a_restart(tmp_path: Path) -> None:
    for again in (False, True):
        async with Serving(tmp_path, heartbeat_s=0.5) as service:
            order = SetLimits("tenant:alice", Limits(monthly_usd=1e-5))
            await administer(service.address, None, service.config.operator_key, order)
            service.may_work.set()
            if not again:
                spend(service)
                continue
            async with lorry.connect(service.address, api_key=service.key) as client:
                training = await client.create_lora_training_client_async("m", rank=4)
                with pytest.raises(
                    LimitReachedError, match=r"monthly_usd is 0\.001000, the limit of tenant:alice is 0\.000010"
                ):
                    await training.forward_backward([DATUM], "cross_entropy")
                await lift(service)
                await training.forward_backward([DATUM], "cross_entropy")


def spend(service: Serving) -> None:
    """A hundred tokens at ten dollars a million, this month."""
    price = parse_prices("[m]\ntrain = 10").of("m", "train")
    future = FutureId("run-0:0")
    row = CommandRow(future, LaneId("run-0"), 0, "forward_backward", ALICE, "m", 1, 1, CommandArguments())
    used = UsageEntry(future, "train", ALICE, "run-0", "m", 100, price, 100 * price)
    with service.store.transaction():
        service.store.command_accepted(row, b"", b"", time.time())
        service.store.command_finished(ResultRow(future, None, b""), "done", None, [used], time.time())


async def test_who_has_stored_enough_saves_no_more_until_something_goes(tmp_path: Path) -> None:
    async with limits_of(tmp_path, stored_bytes=0) as service:
        service.may_work.set()
        async with lorry.connect(service.address, api_key=service.key) as client:
            training = await client.create_lora_training_client_async("m", rank=4)
            with pytest.raises(LimitReachedError, match=r"stored_bytes is 0, the limit .* is 0\. Delete checkpoints"):
                await training.save_state("a")
            await lift(service)
            await training.save_state("a")


async def test_a_keys_limits_count_beside_its_tenants_and_touch_no_other_key(tmp_path: Path) -> None:
    async with Serving(tmp_path, heartbeat_s=0.5) as service:
        second = service.store.create_key(ALICE, 2.0)
        narrow = service.store.api_keys(ALICE)[-1].id
        operator = service.config.operator_key
        await administer(service.address, None, operator, SetLimits(f"key:{narrow}", Limits(rank=2)))
        async with (
            lorry.connect(service.address, api_key=service.key) as wide,
            lorry.connect(service.address, api_key=second) as client,
        ):
            with pytest.raises(LimitReachedError, match=f"rank is 4, the limit of key:{narrow} is 2"):
                await client.create_lora_training_client_async("m", rank=4)
            await wide.create_lora_training_client_async("m", rank=4)
        with pytest.raises(NotFoundError, match="there is no key 'key-9'"):
            await administer(service.address, None, operator, SetLimits("key:key-9", Limits()))
