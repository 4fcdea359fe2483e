"""A command that several actors execute: who gets what of it, in which order, and what a failure or a death leaves."""

from collections.abc import Iterator
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.scheduler.planning.lanes import Command, Lane
from lorry.scheduler.planning.ledger import MAX_ATTEMPTS
from lorry.scheduler.planning.planner import Plan, Planner
from lorry.scheduler.planning.spreading import parts_for
from lorry.wire.actor_messages import Capacity
from lorry.wire.commands import CommandKind
from lorry.wire.ids import ActorId, LaneId, TenantId, future_id

CAPACITY = Capacity(slots=4, token_budget=100, sample_rows=4, max_rank=64)
RUN, OTHER = LaneId("run"), LaneId("other")
PACE = 10.0


class Yard:
    """A planner with three actors, of which each trains PACE tokens a second."""

    def __init__(self, spread_after_s: float = 5.0) -> None:
        self.planner = Planner(spread_after_s)
        self.plans: list[Plan] = []
        self.seqs = {RUN: 0, OTHER: 0}
        for lane in self.seqs:
            self.planner.add_lane(Lane(lane, TenantId(lane), "m"))
        for name in "abc":
            self.join(name)

    def join(self, name: str) -> None:
        self.planner.add_actor(ActorId(name), "m", CAPACITY)
        self.planner.measured(ActorId(name), PACE)

    def send(self, kind: CommandKind, cost: int = 1, lane: LaneId = RUN) -> None:
        seq = self.seqs[lane]
        self.seqs[lane] += 1
        assert self.planner.submit(Command(future_id(lane, seq), lane, seq, kind, TenantId(lane), "m", cost, 0))

    def hand_out(self) -> dict[str, list[str]]:
        """As the broker does: until nobody takes more. What each actor got."""
        found: dict[str, list[str]] = {}
        while plan := next(self._next(), None):
            self.plans.append(plan)
            found.setdefault(plan.actor, []).extend(command.future for command in plan.commands)
        return found

    def _next(self) -> Iterator[Plan]:
        for actor in self.planner.actors_of("m"):
            if plan := self.planner.next_micro_batch(actor):
                yield plan

    def weights(self) -> set[int]:
        """Of all shares that are with actors."""
        return {command.share.weights for plan in self.plans for command in plan.commands if command.share}

    def die(self, name: str, *, read: bool = True) -> list[str]:
        """What is blamed for it; its runs are rebuilt."""
        plans = [plan for plan in self.plans if plan.actor == name]
        self.plans = [plan for plan in self.plans if plan.actor != name]
        lost = self.planner.actor_lost(ActorId(name), () if read else {plan.batch for plan in plans})
        for lane in lost.lanes:
            self.planner.restore(lane, [])
        return [command.future for command in lost.poisoned]

    def end(self, *futures: str, fails: bool = False) -> None:
        for future in futures:
            plan = next(plan for plan in self.plans if any(c.future == future for c in plan.commands))
            for command in plan.commands:
                ended = self.planner.complete(command.future, plan.batch, command.cost)
                if ended is not None and ended.share is not None:
                    self.planner.call_off(ended.lane) if fails else self.planner.share_done(ended)
            self.planner.batch_done(plan.actor, plan.batch)
            self.plans.remove(plan)


def spread_out(yard: Yard, cost: int = 150) -> None:
    yard.send("forward_backward", cost)
    assert yard.hand_out() == {"a": ["run:0/weights"]}
    yard.end("run:0/weights")
    assert yard.hand_out() == {"a": ["run:0/1-0"], "b": ["run:0/1-1"], "c": ["run:0/1-2"]}


def test_what_takes_one_actor_too_long_is_divided_and_gathered_at_its_runs_home() -> None:
    yard = Yard()
    spread_out(yard)
    yard.send("optim_step")
    yard.end("run:0/1-1", "run:0/1-0")
    assert yard.hand_out() == {}, "a step waits for what it is to step by"
    yard.end("run:0/1-2")
    assert yard.hand_out() == {"a": ["run:0"]}
    assert yard.hand_out() == {}, "it may fail yet"
    yard.end("run:0")
    assert yard.hand_out() == {"a": ["run:1"]}


@pytest.mark.parametrize(("cost", "parts"), [(50, 0), (60, 2), (100, 2), (101, 3), (1000, 3)])
def test_it_is_divided_among_as_many_as_it_needs_and_there_are(cost: int, parts: int) -> None:
    yard = Yard()
    yard.send("forward_backward", cost)
    first = yard.hand_out()
    assert first == {"a": ["run:0/weights" if parts else "run:0"]}
    if parts:
        yard.end("run:0/weights")
        assert sum(map(len, yard.hand_out().values())) == parts


def test_nothing_is_divided_while_nobody_knows_how_long_it_takes() -> None:
    planner = Planner(5.0)
    planner.add_lane(Lane(RUN, TenantId("a"), "m"))
    for name in "abc":
        planner.add_actor(ActorId(name), "m", CAPACITY)
    planner.submit(Command(future_id(RUN, 0), RUN, 0, "forward_backward", TenantId("a"), "m", 10**6, 0))
    plan = planner.next_micro_batch(ActorId("a"))
    assert plan is not None and plan.commands[0].share is None


def test_actors_that_have_something_to_train_are_not_borrowed() -> None:
    yard = Yard()
    yard.send("forward_backward", 10, OTHER)
    assert yard.hand_out() == {"a": ["other:0"]}
    yard.send("forward_backward", 200)
    assert yard.hand_out() == {"b": ["run:0/weights"]}
    yard.end("run:0/weights")
    assert yard.hand_out() == {"b": ["run:0/1-0"], "c": ["run:0/1-1"]}


def test_weights_are_published_once_and_again_after_a_step() -> None:
    yard = Yard()
    spread_out(yard)
    yard.send("forward_backward", 150)
    yard.end("run:0/1-0", "run:0/1-1", "run:0/1-2")
    assert yard.hand_out() == {"a": ["run:0"]}
    yard.end("run:0")
    assert yard.hand_out() == {"a": ["run:1/2-0"], "b": ["run:1/2-1"], "c": ["run:1/2-2"]}
    weights = yard.weights()
    yard.end("run:1/2-0", "run:1/2-1", "run:1/2-2")
    yard.hand_out()
    yard.end("run:1")
    yard.send("optim_step")
    yard.send("forward_backward", 150)
    assert yard.hand_out() == {"a": ["run:2", "run:3/weights"]}
    assert yard.weights() != weights


def test_a_part_whose_actor_died_is_computed_by_another_alone() -> None:
    yard = Yard()
    spread_out(yard)
    yard.die("b")
    yard.end("run:0/1-2")
    assert yard.hand_out() == {"c": ["run:0/1-1"]}
    assert yard.plans[-1].alone
    yard.end("run:0/1-0", "run:0/1-1")
    assert yard.hand_out() == {"a": ["run:0"]}


def test_after_the_death_of_its_home_the_command_begins_again_and_its_parts_do_not_count() -> None:
    yard = Yard()
    spread_out(yard)
    yard.die("a")
    yard.end("run:0/1-1", "run:0/1-2")
    assert yard.hand_out() == {"b": ["run:0"]}, "whole: it may have been the cause"
    assert yard.plans[-1].commands[0].share is None


def test_after_the_death_of_a_home_that_it_never_reached_it_is_divided_again() -> None:
    yard = Yard()
    yard.send("forward_backward", 150)
    yard.hand_out()
    yard.die("a", read=False)
    assert yard.hand_out() == {"b": ["run:0/weights"]}


@pytest.mark.parametrize("stage", ["weights", "1-1", "gather"])
def test_what_cannot_be_spread_to_its_end_is_executed_whole_at_home(stage: str) -> None:
    yard = Yard()
    yard.send("forward_backward", 150)
    yard.send("optim_step")
    yard.hand_out()
    if stage != "weights":
        yard.end("run:0/weights")
        yard.hand_out()
    if stage == "gather":
        yard.end("run:0/1-0", "run:0/1-1", "run:0/1-2")
        yard.hand_out()
    yard.end("run:0" if stage == "gather" else f"run:0/{stage}", fails=True)
    whole = yard.hand_out()
    if stage == "1-1":
        assert whole == {}, "home has a part of it still, which takes all of its room"
        yard.end("run:0/1-0")
        whole = yard.hand_out()
    assert whole == {"a": ["run:0", "run:1"]}
    assert yard.plans[-1].commands[0].share is None
    yard.end("run:0")
    assert yard.planner.queued(RUN) == 0


def test_a_command_whose_parts_kill_actors_fails_and_its_run_goes_on() -> None:
    yard = Yard()
    spread_out(yard)
    yard.send("forward_backward", 10)
    yard.end("run:0/1-0", "run:0/1-2")
    holders: list[str] = []
    for _ in range(MAX_ATTEMPTS - 1):
        holders += [plan.actor for plan in yard.plans]
        assert yard.die(holders[-1]) == []
        assert sum(map(len, yard.hand_out().values())) == 1, "it, and nothing beside it"
    holders += [plan.actor for plan in yard.plans]
    assert holders == ["b", "a", "c"], "its run's home among them"
    assert yard.die("c") == ["run:0"]
    yard.join("d")
    assert yard.hand_out() == {"d": ["run:1"]}


def test_the_run_of_a_command_whose_parts_killed_other_actors_is_where_it_was() -> None:
    yard = Yard()
    spread_out(yard)
    yard.send("forward_backward", 10)
    assert yard.die("b") == []
    yard.join("d")
    assert yard.hand_out() == {"d": ["run:0/1-1"]}, "home has another part, and takes no second one"
    assert yard.die("d") == []
    yard.join("e")
    assert yard.hand_out() == {"e": ["run:0/1-1"]}
    assert yard.die("e") == ["run:0"]
    assert yard.planner.home(RUN) == "a"
    yard.end("run:0/1-0", "run:0/1-2")
    assert yard.hand_out() == {"a": ["run:1"]}


def test_actors_that_die_together_died_of_one_try() -> None:
    """A cut cable takes several at once: the command is tried again, alone."""
    yard = Yard()
    spread_out(yard)
    assert yard.die("b") + yard.die("c") + yard.die("a") == []
    yard.join("d")
    assert yard.hand_out() == {"d": ["run:0"]}
    assert yard.plans[-1].alone


@pytest.mark.parametrize("dies", [True, False])
def test_parts_that_come_to_nothing_are_not_charged(dies: bool) -> None:
    yard = Yard()
    spread_out(yard)
    yard.end("run:0/1-1", "run:0/1-2")
    yard.die("a") if dies else yard.end("run:0/1-0", fails=True)
    assert yard.planner.shares("m").served(TenantId("run")) == pytest.approx(0, abs=3)


def test_of_two_tenants_parts_the_one_that_was_served_less_is_next() -> None:
    yard = Yard()
    spread_out(yard, 300)
    yard.send("forward_backward", 300, OTHER)
    for name in "de":
        yard.join(name)
    assert yard.hand_out() == {"b": ["other:0/weights"]}
    yard.end("other:0/weights")
    assert yard.hand_out()["e"][0].startswith("other:0/")
    yard.die("e")
    yard.die("c")
    yard.planner.shares("m").charge(TenantId("run"), 500)
    yard.join("f")
    assert yard.hand_out()["f"][0].startswith("other:0/"), "though the run's part waits longer"


def test_a_part_waits_for_its_tenants_turn() -> None:
    yard = Yard()
    spread_out(yard)
    yard.die("c")
    for _ in range(3):
        yard.send("forward_backward", 40, OTHER)
    yard.planner.shares("m").charge(TenantId("run"), 50)
    yard.end("run:0/1-1")
    assert yard.hand_out()["b"] == ["other:0", "other:1", "run:0/1-2", "other:2"], "who was served less comes first"


def test_a_command_that_is_spread_cannot_be_dropped() -> None:
    yard = Yard()
    spread_out(yard)
    assert yard.planner.cancel(future_id(RUN, 0)) == "in_flight"
    assert yard.planner.is_spread(future_id(RUN, 0))


def test_a_run_that_is_given_up_meanwhile_drops_the_command() -> None:
    yard = Yard()
    spread_out(yard)
    yard.send("optim_step")
    assert [command.future for command in yard.planner.break_lane(RUN)] == ["run:1", "run:0"]
    yard.end("run:0/1-0", "run:0/1-1", "run:0/1-2")
    assert yard.hand_out() == {}


def test_what_a_part_costs_is_charged_once() -> None:
    yard = Yard()
    spread_out(yard)
    yard.end("run:0/1-0", "run:0/1-1", "run:0/1-2")
    yard.hand_out()
    yard.end("run:0")
    assert yard.planner.shares("m").served(TenantId("run")) == pytest.approx(150, abs=3)


@given(st.floats(0.1, 1e6), st.floats(0.1, 1e6), st.integers(1, 100))
def test_parts_are_as_many_as_it_takes_and_there_are(alone_s: float, spread_after_s: float, free: int) -> None:
    parts = parts_for(alone_s, spread_after_s, free)
    assert 1 <= parts <= free
    assert parts == free or alone_s / parts <= spread_after_s
    assert parts == 1 or alone_s / (parts - 1) > spread_after_s
    assert parts_for(alone_s, inf, free) == 1
