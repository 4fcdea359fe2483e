"""Base models that share a device: each gets its part of the time while several have work, and all of it when alone."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.config import parse_weights
from lorry.scheduler.planning.devices import QUANTUM_S
from lorry.scheduler.planning.lanes import Command, Lane
from lorry.scheduler.planning.planner import Planner
from lorry.wire.actor_messages import Capacity
from lorry.wire.errors import InvalidRequestError
from lorry.wire.ids import ActorId, BatchId, LaneId, TenantId, future_id

TENANT = TenantId("t")


class Bench:
    """Actors of several models on one device, which does what it has side by side, each at its part of the speed."""

    def __init__(self, weights: dict[str, float], took_s: dict[str, float]) -> None:
        self.planner, self.now = Planner(model_weights=weights), 0.0
        self.took_s, self.used_s = took_s, Counter[str]()
        self.left_s = dict[tuple[str, BatchId], float]()
        self.waits = defaultdict[str, int](int)
        for model in took_s:
            capacity = Capacity(slots=4, token_budget=1, sample_rows=1, max_rank=8)
            self.planner.add_actor(ActorId(model), model, capacity, "box/gpu")
            self.planner.add_lane(Lane(LaneId(model), TENANT, model))

    def ask(self, model: str, count: int) -> None:
        for _ in range(count):
            seq = self.waits[model]
            self.planner.submit(Command(future_id(LaneId(model), seq), LaneId(model), seq, "forward", TENANT, model))
            self.waits[model] += 1

    def run(self, until: float) -> None:
        while self.now < until:
            again = self.planner.look_again_after(self.now)
            for model in self.took_s:
                while plan := self.planner.next_micro_batch(ActorId(model)):
                    self.left_s[model, plan.batch] = self.took_s[model] * len(plan.commands)
                    for command in plan.commands:
                        self.planner.complete(command.future, plan.batch, 1)
            self.planner.look_again_after(self.now)
            self._go_on(until, again)

    def _go_on(self, until: float, again: float) -> None:
        first = {model: min(key for key in self.left_s if key[0] == model) for model, _ in self.left_s}
        step = min([self.left_s[key] * len(first) for key in first.values()] + [again, until - self.now])
        step = max(step, 1e-6)
        self.now += step
        for model, key in first.items():
            self.left_s[key] -= step / len(first)
            self.used_s[model] += step / len(first)
            if self.left_s[key] <= 1e-9:
                del self.left_s[key]
                self.planner.batch_done(ActorId(model), key[1])


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abc"), st.floats(0.25, 4), min_size=2, max_size=3),
    st.lists(st.floats(0.05, 0.5), min_size=3, max_size=3),
)
def test_while_all_have_work_each_gets_its_part_of_the_time(weights: dict[str, float], took: list[float]) -> None:
    bench = Bench(weights, dict(zip(weights, took, strict=False)))
    for model in weights:
        bench.ask(model, 700)
    bench.run(30.0)
    shares = {model: bench.used_s[model] / weights[model] for model in weights}
    least = min(shares.values())
    for model, share in shares.items():
        # What was handed out is done, too: two micro-batches, beside as many of each of the others.
        late_s = QUANTUM_S + 2 * max(took) * len(weights)
        assert (share - least) * weights[model] <= late_s * (1 + weights[model] / min(weights.values()))


def test_who_has_work_alone_gets_everything_and_who_was_away_claims_nothing() -> None:
    bench = Bench({"a": 1.0, "b": 1.0}, {"a": 0.1, "b": 0.1})
    bench.ask("a", 10_000)
    bench.run(30.0)
    assert bench.used_s["a"] == pytest.approx(30.0, rel=1e-3)
    bench.ask("b", 10_000)
    bench.run(40.0)
    assert bench.used_s["b"] == pytest.approx(5.0, abs=QUANTUM_S + 0.4)


def test_without_weights_nobody_is_held_back() -> None:
    bench = Bench({}, {"a": 0.1, "b": 0.4})
    for model in "ab":
        bench.ask(model, 1000)
    bench.run(20.0)
    assert bench.used_s["a"] == pytest.approx(10.0, abs=0.5)
    assert bench.planner.look_again_after(bench.now) == float("inf")


@pytest.mark.parametrize("wrong", ["m", "m=heavy", "n=2", "m=0", "m=nan"])
def test_what_is_no_weight_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"model_weight is '{wrong}', expected"):
        parse_weights([wrong], ["m"])
    assert parse_weights(["m=2", "a=b=1"], ["m", "a=b"]) == {"m": 2.0, "a=b": 1.0}


def test_nobody_waits_for_a_model_that_can_take_nothing_there() -> None:
    """Its work is homed on another device, or waits for a limit of its tenant's."""
    bench = Bench({"a": 1.0, "b": 1.0}, {"a": 0.1, "b": 0.1})
    planner, elsewhere = bench.planner, ActorId("a elsewhere")
    planner.add_actor(
        elsewhere, "a", Capacity(slots=4, token_budget=1, sample_rows=1, max_rank=8, credits=1), "box/other"
    )
    planner.add_lane(Lane(lane := LaneId("homed there"), TENANT, "a", home=elsewhere))
    for seq in range(2):
        planner.submit(Command(future_id(lane, seq), lane, seq, "forward", TENANT, "a"))
    assert planner.next_micro_batch(elsewhere) is not None, "and the second waits for the first"
    bench.ask("b", 700)
    bench.run(20.0)
    assert bench.used_s["b"] == pytest.approx(20.0, rel=1e-2)
    bench.ask("a", 700)
    bench.run(40.0)
    assert bench.used_s["a"] == pytest.approx(10.0, abs=QUANTUM_S + 0.4), "once it has some, it gets its part"
