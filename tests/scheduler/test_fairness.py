"""Shares of tokens among tenants: the bound of the virtual token counter, and what newcomers get."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.scheduler.planning.fairness import Shares
from lorry.scheduler.planning.lanes import Command, Lane
from lorry.scheduler.planning.planner import Planner
from lorry.wire.actor_messages import Capacity
from lorry.wire.ids import ActorId, LaneId, TenantId, future_id

BUDGET, LARGEST = 100, 80
A, B, C = (TenantId(name) for name in "abc")


def backlogged(costs: dict[TenantId, list[int]], weights: dict[TenantId, float] | None = None) -> Planner:
    planner = Planner()
    planner.add_actor(ActorId("actor"), "base", Capacity(slots=8, token_budget=BUDGET, sample_rows=4, max_rank=64))
    for tenant, weight in (weights or {}).items():
        planner.set_weight(tenant, weight)
    for tenant, all_costs in costs.items():
        lane = LaneId(f"run-{tenant}")
        planner.add_lane(Lane(lane, tenant, "base"))
        for seq, cost in enumerate(all_costs):
            planner.submit(Command(future_id(lane, seq), lane, seq, "forward_backward", tenant, "base", cost, 0))
    return planner


def serve(planner: Planner, rounds: int) -> dict[TenantId, int]:
    served: dict[TenantId, int] = {A: 0, B: 0, C: 0}
    for _ in range(rounds):
        if (plan := planner.next_micro_batch(ActorId("actor"))) is None:
            break
        for command in plan.commands:
            served[command.tenant] += command.cost
            planner.complete(command.future, plan.batch, command.cost)
        planner.batch_done(ActorId("actor"), plan.batch)
    return served


COSTS = st.lists(st.integers(1, LARGEST), min_size=60, max_size=60)
WEIGHTS = st.just(1.0) | st.floats(0.1, 10)


@given(COSTS, COSTS, WEIGHTS, WEIGHTS, st.integers(1, 25))
def test_backlogged_tenants_are_served_by_their_weights_within_one_micro_batch(
    a: list[int], b: list[int], weight_a: float, weight_b: float, rounds: int
) -> None:
    planner = backlogged({A: a * 2, B: b * 2}, {A: weight_a, B: weight_b})
    served = serve(planner, rounds)
    if served[A] < sum(a) and served[B] < sum(b):
        bound = (BUDGET + LARGEST) / min(weight_a, weight_b)
        assert abs(served[A] / weight_a - served[B] / weight_b) <= bound + 1e-9


@given(COSTS, COSTS, WEIGHTS, st.integers(1, 10), st.integers(1, 15))
def test_a_weight_that_is_changed_holds_from_then_on_and_for_nothing_before(
    a: list[int], b: list[int], weight: float, before: int, rounds: int
) -> None:
    planner = backlogged({A: a * 2, B: b * 2})
    earlier = serve(planner, before)
    planner.set_weight(A, weight)
    served = serve(planner, rounds)
    if earlier[A] + served[A] < sum(a) and earlier[B] + served[B] < sum(b):
        bound = 2 * (BUDGET + LARGEST) / min(weight, 1.0)  # both stretches may begin or end in favour of either
        assert abs(served[A] / weight - served[B]) <= bound + 1e-9


def test_a_weight_of_three_gets_three_times_the_tokens() -> None:
    served = serve(backlogged({A: [10] * 900, B: [10] * 900}, {A: 3.0}), 60)
    assert served[A] / served[B] == pytest.approx(3, rel=0.1)


def test_a_tenant_with_one_command_is_served_in_the_next_round_however_much_others_queue() -> None:
    """A round serves each tenant once: here three commands of 50 tokens, so two micro-batches of 100."""
    planner = backlogged({A: [50] * 100, B: [50] * 100})
    serve(planner, 10)
    lane = LaneId("run-c")
    planner.add_lane(Lane(lane, C, "base"))
    planner.submit(Command(future_id(lane, 0), lane, 0, "forward_backward", C, "base", 50, 0))
    assert serve(planner, 2)[C] == 50


def test_idleness_earns_no_claim_on_the_past() -> None:
    shares = Shares()
    shares.work_arrived(A)
    shares.charge(A, 1000)
    shares.work_arrived(B)
    assert shares.served(B) == 1000
    shares.charge(B, 10)
    assert shares.least_served([A, B]) == A


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(1, 50)), max_size=40))
def test_a_newcomer_never_starts_below_the_least_active(history: list[tuple[TenantId, int]]) -> None:
    shares = Shares()
    active: set[TenantId] = set()
    for tenant, tokens in history:
        if tenant not in active:
            floor = min((shares.served(other) for other in active), default=0.0)
            shares.work_arrived(tenant)
            assert shares.served(tenant) >= floor
            active.add(tenant)
        else:
            shares.charge(tenant, tokens)


def test_a_weight_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="weight of a is 0"):
        Planner().set_weight(A, 0)
