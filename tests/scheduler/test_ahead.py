"""What a waiting command is told: what is before it, and for about how long. And what goes first of one tenant's."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorry
from lorry.scheduler.planning.foresight import Foresight
from lorry.scheduler.planning.lanes import Command, Lane
from lorry.scheduler.planning.limits import holders_of
from lorry.scheduler.planning.planner import Planner
from lorry.scheduler.planning.queue import Queue
from lorry.scheduler.planning.rates import Rates
from lorry.wire.actor_messages import Capacity
from lorry.wire.errors import InvalidRequestError, NotFoundError
from lorry.wire.ids import ActorId, FutureId, LaneId, TenantId, future_id
from lorry.wire.model_input import ModelInput
from lorry.wire.types import SamplingParams

from .test_client_door import DATUM, Serving

ACTOR, M = ActorId("a"), "m"
BUDGET = 100
EACH = 8
"""Tokens of a sample: the bytes of its message count, too."""
PROMPT, ONE = ModelInput.from_ints([1]), SamplingParams(max_tokens=1)
ROWS = 64
"""What the scripted actor samples at the same time."""
TENANTS = [TenantId(name) for name in "tuvw"]


def loaded(
    weights: list[float], runs: list[tuple[int, int, list[int]]], sample_rows: int = 64
) -> tuple[Planner, list[Command]]:
    """A planner with one actor, and what waits in it: each run's tenant, priority, and the tokens of its requests."""
    planner = Planner()
    planner.add_actor(
        ACTOR, M, Capacity(slots=100, token_budget=BUDGET, credits=1, sample_rows=sample_rows, max_rank=64)
    )
    for tenant, weight in zip(TENANTS, weights, strict=False):
        planner.set_weight(tenant, weight)
    commands: list[Command] = []
    for number, (tenant, priority, costs) in enumerate(runs):
        lane = LaneId(f"run-{number}")
        planner.add_lane(Lane(lane, TENANTS[tenant], M, priority=priority))
        for seq, cost in enumerate(costs):
            command = Command(future_id(lane, seq), lane, seq, "forward_backward", TENANTS[tenant], M, cost)
            planner.submit(command)
            planner.meters.opened(holders_of(TENANTS[tenant], None), lane, cost)
            commands.append(command)
    return planner, commands


def handed_out(planner: Planner) -> list[list[Command]]:
    """Everything, in micro-batches, in the order in which these are executed."""
    found: list[list[Command]] = []
    while plan := planner.next_micro_batch(ACTOR):
        for command in plan.commands:
            planner.complete(command.future, plan.batch, command.cost)
            planner.meters.closed(holders_of(command.tenant, None), command.lane, command.cost)
        planner.batch_done(ACTOR, plan.batch)
        found.append(list(plan.commands))
    return found


some_runs = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 1), st.lists(st.integers(1, 60), min_size=1, max_size=6)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=300)
@given(st.lists(st.floats(0.25, 4), min_size=4, max_size=4), some_runs, st.data())
def test_what_is_said_to_be_before_a_request_is_executed_before_it(
    weights: list[float], runs: list[tuple[int, int, list[int]]], data: st.DataObject
) -> None:
    """Those of one micro-batch are executed together; and what whose turn it is varies, in whole requests."""
    planner, commands = loaded(weights, runs)
    chosen = data.draw(st.sampled_from(commands))
    ahead = Foresight(planner).ahead(chosen.tenant, M, chosen.lane, chosen.future, chosen.seq, 1e9)
    assert ahead is not None
    batches = handed_out(planner)
    at = next(number for number, batch in enumerate(batches) if chosen in batch)
    before = [command for batch in batches[:at] for command in batch]
    beside = [command for command in batches[at] if command is not chosen]
    largest = max(command.cost for command in commands)
    turns = largest * sum(1 + weight / weights[TENANTS.index(chosen.tenant)] for weight in weights) + largest * len(
        runs
    )
    assert tokens(before) - turns <= ahead.tokens <= tokens(before) + tokens(beside) + turns
    mine, also_mine = ([c for c in found if c.tenant == chosen.tenant] for found in (before, beside))
    assert len(mine) - len(runs) <= ahead.requests <= len(mine) + len(also_mine) + len(runs)


def tokens(commands: list[Command]) -> int:
    return sum(command.cost for command in commands)


@given(some_runs)
def test_of_one_tenants_runs_those_of_the_highest_priority_go_first(runs: list[tuple[int, int, list[int]]]) -> None:
    planner, _ = loaded([], [(0, priority, costs) for _, priority, costs in runs])
    priorities = {f"run-{number}": priority for number, (_, priority, _) in enumerate(runs)}
    order = [{priorities[command.lane] for command in batch} for batch in handed_out(planner)]
    lowest_of_each = [min(batch) for batch in order]
    assert lowest_of_each == sorted(lowest_of_each, reverse=True)
    assert all(len(batch) == 1 or later == {0} for batch, later in pairwise([*order, {0}])), (
        "one of both is the last of 1"
    )


@given(
    st.lists(st.tuples(st.sampled_from(["add", "back", "remove", "first", "prioritise"]), st.integers(0, 3))),
)
def test_a_queue_is_ordered_by_priority_and_then_as_it_came(steps: list[tuple[str, int]]) -> None:
    queue, expected = Queue(), list[tuple[int, int, Command]]()
    for number, (step, priority) in enumerate(steps):
        lane = LaneId(f"s-{number % 3}")
        command = Command(future_id(lane, number), lane, number, "sample", TENANTS[0], M, number + 1, priority=priority)
        match step:
            case "add":
                queue.append(command)
                expected.append((-priority, number, command))
            case "back":
                queue.put_back(command)
                expected.append((-priority, -number, command))
            case "remove" if expected:
                *_, gone = expected.pop(priority % len(expected))
                queue.remove(gone)
            case "first" if expected:
                expected.sort(key=lambda item: item[:2])
                queue.remove(expected.pop(0)[2])
            case "prioritise":
                queue.prioritise(lane, priority)
                found = {held.future: held for held in queue}
                expected = [(-found[held.future].priority, place, found[held.future]) for _, place, held in expected]
            case _:
                pass
        expected.sort(key=lambda item: item[:2])
        assert list(queue) == [held for *_, held in expected]
        assert [queue.before(held.future) for *_, held in expected] == list(range(len(expected)))
        assert queue.tokens == sum(held.cost for *_, held in expected)
        assert queue.find(FutureId("nobody:0")) is None


@given(st.lists(st.tuples(st.floats(0.1, 5), st.integers(1, 1000)), min_size=30, max_size=60))
def test_a_pace_is_what_ended_in_the_time_that_was_busy(ended: list[tuple[float, int]]) -> None:
    rates, now = Rates(), 1e9
    rates.ended(M, "train", 10**9, now - 100, is_busy=False)
    rates.ended(M, "train", 10**9, now, is_busy=True)  # nobody knows how long this one took
    for pause, tokens in ended:
        now += pause
        rates.ended(M, "train", tokens, now, is_busy=True)
    began, at, inside = max(1e9, now - 60), 1e9, 0
    for pause, tokens in ended:
        at += pause
        inside += tokens if at >= began else 0
    rate = rates.rate(M, "train", now)
    assert rate is not None
    assert rate.over_s == now - began
    assert -1e-3 <= rate.tokens_per_s * rate.over_s - inside <= 1000 * 12, "counted by whole seconds"
    assert rates.rate(M, "sample", now) is None
    assert rates.rate(M, "train", now + 1000) is None


async def test_a_client_that_waits_is_told_what_is_before_it(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        sampler, rest = await client.create_sampling_client_async(base_model="m"), client.create_rest_client()
        full = [sampler.sample(PROMPT, 1, ONE) for _ in range(ROWS)]
        waiting = [sampler.sample(PROMPT, 1, ONE) for _ in range(10)]
        await client.create_sampling_client_async(base_model="m")  # what was asked before is in the journal, too
        told = await rest.get_queue_state_async(waiting[-1].id)
        assert (told.state, told.requests_before, told.tokens_before) == ("active", 9, EACH * (ROWS + 9))
        assert (told.wait_s, told.basis) == (None, "no pace of sampling on m is known yet")
        before = f"9 requests of yours are before it, {EACH * (ROWS + 9)} tokens in all"
        assert told.reason == f"it waits for its turn: {before}; {told.basis}"
        service.may_work.set()
        for future in (*full, *waiting):
            await future
        training = await client.create_lora_training_client_async("m", rank=4)
        await (over := training.forward_backward([DATUM], "cross_entropy"))
        with pytest.raises(NotFoundError, match="does not wait for anything"):
            await rest.get_queue_state_async(over.id)


async def test_what_has_a_higher_priority_goes_first_also_where_it_waits_already(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        rest, first = client.create_rest_client(), await client.create_sampling_client_async(base_model="m")
        low, usual, high = [
            await client.create_sampling_client_async(base_model="m", priority=priority) for priority in (-3, 0, 3)
        ]
        for _ in range(ROWS):
            first.sample(PROMPT, 1, ONE)
        asked = {name: sampler.sample(PROMPT, 1, ONE) for name, sampler in {"l": low, "u": usual, "h": high}.items()}
        await client.create_sampling_client_async(base_model="m")

        async def order() -> str:
            before = {
                name: (await rest.get_queue_state_async(future.id)).requests_before for name, future in asked.items()
            }
            return "".join(sorted(before, key=lambda name: before[name] or 0))

        assert await order() == "hul"
        await rest.set_priority_async(low.sampler_id, 100)
        assert await order() == "lhu"
        for wrong in (101, -101):
            with pytest.raises(InvalidRequestError, match=f"priority is {wrong}, expected a whole number from -100 to"):
                await rest.set_priority_async(low.sampler_id, wrong)
        await client.create_lora_training_client_async("m", rank=4, priority=7)
        service.may_work.set()
        for future in asked.values():
            await future
