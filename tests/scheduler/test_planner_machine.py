"""The planner driven through random interleavings of submissions, completions, failures and lost actors."""

from collections import Counter, defaultdict
from math import inf
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from lorry.scheduler.planning.lanes import CHANGES_WEIGHTS, Command, Lane
from lorry.scheduler.planning.ledger import MAX_ATTEMPTS, blamed_for
from lorry.scheduler.planning.planner import Plan, Planner
from lorry.scheduler.planning.spreading import Share
from lorry.wire.actor_messages import Capacity
from lorry.wire.commands import PHASES, CommandKind
from lorry.wire.ids import ActorId, LaneId, TenantId, future_id

MODEL = "base"
CAPACITY = Capacity(slots=3, token_budget=100, sample_rows=4, max_rank=64)
TENANTS = [TenantId(name) for name in "abc"]
RUNS = [(LaneId(f"run{i}"), TENANTS[i % 3]) for i in range(6)]
TRAINING: list[CommandKind] = ["forward", "forward_backward", "optim_step", "save_state", "load_state"]


def is_publishing(command: Command) -> bool:
    return command.share is not None and command.share.stage == "publish"


class PlannerMachine(RuleBasedStateMachine):
    actors = Bundle("actors")

    @initialize(target=actors, spread_after_s=st.sampled_from((inf, 0.0, 0.0)))
    def start(self, spread_after_s: float) -> Any:
        """Where commands are spread, there are some to spread them over."""
        self.planner = Planner(spread_after_s)
        self.sent: dict[str, Command] = {}
        self.seqs: dict[LaneId, int] = defaultdict(int)
        self.held: dict[ActorId, list[Plan]] = {}
        self.finished: set[str] = set()
        self.cancelled: set[str] = set()
        self.poisoned: set[str] = set()
        self.applied: dict[LaneId, list[int]] = defaultdict(list)
        self.homes: dict[LaneId, ActorId] = {}
        self.rebuilding: dict[LaneId, list[int]] = defaultdict(list)
        self.leaving: set[ActorId] = set()
        self.taken_back: dict[int, set[str]] = defaultdict(set)
        self.deaths: Counter[str] = Counter()
        self.steps: Counter[LaneId] = Counter()
        self.published: dict[int, tuple[LaneId, int]] = {}
        self.parts_left: dict[int, set[int]] = {}
        self.born = 0
        for run, tenant in RUNS:
            self.planner.add_lane(Lane(run, tenant, MODEL))
        return multiple(*(self.an_actor_joins() for _ in range(0 if spread_after_s else 3)))

    @rule(target=actors)
    def an_actor_joins(self) -> ActorId:
        self.born += 1
        actor = ActorId(f"actor{self.born}")
        self.planner.add_actor(actor, MODEL, CAPACITY)
        self.held[actor] = []
        return actor

    @rule(run=st.sampled_from(RUNS), kinds=st.lists(st.sampled_from(TRAINING), min_size=1, max_size=6), data=st.data())
    def commands_arrive_in_any_order(
        self, run: tuple[LaneId, TenantId], kinds: list[CommandKind], data: st.DataObject
    ) -> None:
        lane, tenant = run
        commands: list[Command] = []
        for kind in kinds:
            seq = self.seqs[lane]
            self.seqs[lane] += 1
            cost = data.draw(st.integers(1, 150)) if kind in ("forward", "forward_backward") else 1
            commands.append(Command(future_id(lane, seq), lane, seq, kind, tenant, MODEL, cost, 0))
        for command in data.draw(st.permutations(commands)):
            assert self.planner.submit(command)
            self.sent[command.future] = command

    @rule(tenant=st.sampled_from(TENANTS), rows=st.integers(1, 6))
    def a_sample_arrives(self, tenant: TenantId, rows: int) -> None:
        lane = LaneId(f"sampler-{tenant}")
        seq = self.seqs[lane]
        self.seqs[lane] += 1
        command = Command(future_id(lane, seq), lane, seq, "sample", tenant, MODEL, 10 * rows, rows)
        assert self.planner.submit(command)
        self.sent[command.future] = command

    @precondition(lambda self: any(c.kind != "sample" for c in self.sent.values()))
    @rule(data=st.data())
    def a_command_is_sent_twice(self, data: st.DataObject) -> None:
        again = data.draw(st.sampled_from(sorted(f for f, c in self.sent.items() if c.kind != "sample")))
        assert not self.planner.submit(self.sent[again])

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def a_command_is_cancelled(self, data: st.DataObject) -> None:
        future = data.draw(st.sampled_from(sorted(self.sent)))
        outcome = self.planner.cancel(self.sent[future].future)
        in_flight = future in self.in_flight()
        over = future in self.finished | self.cancelled | self.poisoned
        in_flight |= self.planner.is_spread(self.sent[future].future)
        assert outcome == ("in_flight" if in_flight else "unknown" if over else "dropped")
        if outcome == "dropped":
            self.cancelled.add(future)

    @rule(run=st.sampled_from(RUNS))
    def a_command_is_refused(self, run: tuple[LaneId, TenantId]) -> None:
        lane, _ = run
        seq = self.seqs[lane]
        self.seqs[lane] += 1
        self.planner.skip(lane, seq)
        self.cancelled.add(future_id(lane, seq))

    @rule(actor=actors)
    def an_actor_is_given_all_it_takes(self, actor: ActorId) -> None:
        if actor not in self.held:
            return
        while plan := self.planner.next_micro_batch(actor):
            assert actor not in self.leaving
            self.check_plan(actor, plan)
            self.held[actor].append(plan)
        plans = [plan for plan in self.held[actor] if plan.mode == "train"]
        train = [plan.cost for plan in plans]
        tails = sum(PHASES[c.kind] > 0 or is_publishing(c) for plan in plans for c in plan.commands)
        assert sum(train) - tails <= CAPACITY.credits * CAPACITY.token_budget + max(train, default=0)

    @rule()
    def all_actors_are_given_all_they_take(self) -> None:
        for actor in self.held:
            self.an_actor_is_given_all_it_takes(actor)

    def in_flight(self) -> set[str]:
        return {c.future for plans in self.held.values() for plan in plans for c in self.live(plan)}

    def live(self, plan: Plan) -> list[Command]:
        return [c for c in plan.commands if c.future not in self.taken_back[plan.batch]]

    def check_plan(self, actor: ActorId, plan: Plan) -> None:
        in_flight = self.in_flight()
        by_lane: dict[LaneId, list[Command]] = defaultdict(list)
        for command in plan.commands:
            assert command.future not in in_flight
            assert command.future not in self.cancelled | self.poisoned
            assert command.replay or command.future not in self.finished
            if command.share is not None and command.share.stage == "part":
                self.check_part(actor, plan, command, command.share)
            else:
                by_lane[command.lane].append(command)
        if plan.mode == "train":
            assert len(by_lane) <= CAPACITY.slots
            costs = [c.cost for c in plan.commands if PHASES[c.kind] == 0 and not is_publishing(c)]
            assert sum(costs) <= CAPACITY.token_budget or len(costs) == 1
            for lane, commands in by_lane.items():
                self.check_lane(actor, lane, commands)

    def check_part(self, actor: ActorId, plan: Plan, part: Command, share: Share) -> None:
        assert plan.commands == (part,), "a part is a micro-batch of its own"
        assert self.published[share.weights] == (part.lane, self.steps[part.lane]), "its weights are the run's"
        assert share.index in self.parts_left.setdefault(share.spread, set(range(share.parts)))
        others = (c.share for held in self.held[actor] for c in self.live(held) if c.share)
        assert all(other.spread != share.spread for other in others), "an actor has one part of a command at a time"

    def check_lane(self, actor: ActorId, lane: LaneId, commands: list[Command]) -> None:
        assert self.homes.setdefault(lane, actor) == actor, "a run's state is on one actor"
        phases = [PHASES[command.kind] for command in commands]
        assert phases == sorted(phases)
        assert phases.count(1) <= 1 and phases.count(3) <= 1
        for command in commands:
            if command.replay:
                assert command.seq == self.rebuilding[lane].pop(0)
                continue
            assert not self.rebuilding[lane], "lost state is rebuilt before anything new"
            if is_publishing(command):
                continue
            if command.share is not None:
                assert not self.parts_left[command.share.spread], "all of its parts are done"
                assert command is commands[-1]
            elif command.kind in CHANGES_WEIGHTS:
                self.steps[lane] += 1
            skipped = range(self.applied[lane][-1] + 1 if self.applied[lane] else 0, command.seq)
            over = self.cancelled | self.poisoned
            assert all(future_id(lane, seq) in over for seq in skipped), "no gap in a run's order"
            self.applied[lane].append(command.seq)

    @rule(actor=actors, tokens=st.integers(0, 200), fails=st.sampled_from((False, False, True)))
    def a_micro_batch_completes(self, actor: ActorId, tokens: int, fails: bool) -> None:
        """`fails`: what of a command is spread cannot be done."""
        if not self.held.get(actor):
            return
        plan = self.held[actor].pop(0)
        for command in plan.commands:
            completed = self.planner.complete(command.future, plan.batch, tokens)
            if command.future in self.taken_back[plan.batch]:
                assert completed is None, "what was taken back does not end with this batch"
                continue
            assert completed == command
            again = self.planner.complete(command.future, plan.batch, tokens)
            assert again is None, "a second completion does not count"
            self.taken_back[plan.batch].add(command.future)
            if command.share is not None and fails:
                self.called_off(command)
                continue
            if command.share is not None:
                self.planner.share_done(command)
                self.note_done(command, command.share)
            if command.share is None or command.share.stage == "gather":
                self.finished.add(command.future)
                del self.deaths[command.future]
        self.planner.batch_done(actor, plan.batch)

    def note_done(self, command: Command, share: Share) -> None:
        if share.stage == "publish":
            self.published[share.weights] = command.lane, self.steps[command.lane]
        elif share.stage == "part":
            self.parts_left[share.spread].remove(share.index)

    def called_off(self, command: Command) -> None:
        assert command.share is not None
        self.planner.call_off(command.lane)
        self.recall(command.lane, shares_alone=True)
        if command.share.stage == "gather":
            self.applied[command.lane].remove(command.seq)

    def recall(self, lane: LaneId, *, shares_alone: bool) -> set[str]:
        """What of a lane is with actors does not count any more; returns what was to be new."""
        new: set[str] = set()
        for plan in (plan for plans in self.held.values() for plan in plans):
            back = [c for c in self.live(plan) if c.lane == lane and (c.share or not shares_alone)]
            self.taken_back[plan.batch] |= {c.future for c in back}
            new |= {c.future for c in back if not c.replay}
        return new

    @rule(actor=actors)
    def an_actor_is_leaving(self, actor: ActorId) -> None:
        if actor in self.held:
            self.planner.retire(actor)
            self.leaving.add(actor)
            assert actor not in self.planner.actors_of(MODEL)

    @rule(actor=consumes(actors), read=st.integers(0, 4))
    def an_actor_dies(self, actor: ActorId, read: int) -> None:
        """What it was handed last may not have reached it."""
        if actor not in self.held:
            return
        plans = self.held.pop(actor)
        held = {c.future for plan in plans for c in self.live(plan) if not c.replay}
        self.deaths.update(blamed_for(c).future for plan in plans[:read] for c in self.live(plan))
        lost = self.planner.actor_lost(actor, {plan.batch for plan in plans[read:]})
        self.poisoned |= {command.future for command in lost.poisoned}
        assert self.poisoned <= set(self.sent)
        assert all(self.deaths[command.future] == MAX_ATTEMPTS for command in lost.poisoned)
        assert set(lost.lanes) | set(lost.broken) == {lane for lane, home in self.homes.items() if home == actor}
        for lane in (*lost.lanes, *lost.broken):
            del self.homes[lane]
            held |= self.recall(lane, shares_alone=True)
            done = [seq for seq in self.applied[lane] if future_id(lane, seq) not in held]
            self.applied[lane] = done
            self.rebuilding[lane] = []
        for command in lost.poisoned:
            self.recall(command.lane, shares_alone=True)
        for lane in lost.lanes:
            replay = [self.as_replay(lane, seq) for seq in self.applied[lane]]
            self.rebuilding[lane] = [command.seq for command in replay]
            self.planner.restore(lane, replay)

    @precondition(lambda self: self.homes)
    @rule(data=st.data())
    def a_run_cannot_be_restored(self, data: st.DataObject) -> None:
        """Its actor still holds the batches with its commands, and will end them when they no longer count."""
        lane = data.draw(st.sampled_from(sorted(self.homes)))
        del self.homes[lane]
        held = self.recall(lane, shares_alone=False)
        self.planner.take_back(lane)
        self.applied[lane] = [seq for seq in self.applied[lane] if future_id(lane, seq) not in held]
        replay = [self.as_replay(lane, seq) for seq in self.applied[lane]]
        self.rebuilding[lane] = [command.seq for command in replay]
        self.planner.restore(lane, replay)

    def as_replay(self, lane: LaneId, seq: int) -> Command:
        command = self.sent[future_id(lane, seq)]
        return Command(
            command.future, lane, seq, command.kind, command.tenant, MODEL, command.cost, command.rows, replay=True
        )

    def teardown(self) -> None:
        """Whatever happened: once nothing more goes wrong, everything ends."""
        if not hasattr(self, "planner"):
            return
        for actor in [actor for actor in self.held if actor in self.leaving]:
            self.an_actor_dies(actor, 0)
        self.an_actor_joins()
        while True:
            for actor in self.held:
                self.an_actor_is_given_all_it_takes(actor)
            if not any(self.held.values()):
                break
            for actor in self.held:
                self.a_micro_batch_completes(actor, 1, fails=False)
        assert set(self.sent) <= self.finished | self.cancelled | self.poisoned

    @invariant()
    def what_is_over_is_over(self) -> None:
        assert not self.finished & (self.cancelled | self.poisoned)


PlannerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestPlanner = PlannerMachine.TestCase


def test_what_waits_behind_a_refused_command_runs() -> None:
    planner, lane, actor = Planner(), LaneId("run"), ActorId("actor")
    planner.add_lane(Lane(lane, TENANTS[0], MODEL))
    planner.add_actor(actor, MODEL, CAPACITY)
    planner.submit(Command(future_id(lane, 1), lane, 1, "optim_step", TENANTS[0], MODEL, 1, 0))
    assert planner.next_micro_batch(actor) is None
    planner.skip(lane, 0)
    plan = planner.next_micro_batch(actor)
    assert plan is not None and [command.seq for command in plan.commands] == [1]


def test_a_command_that_kills_actors_runs_alone_and_then_fails_alone() -> None:
    planner = Planner()
    lanes = [LaneId("poison"), LaneId("innocent")]
    for lane in lanes:
        planner.add_lane(Lane(lane, TenantId(lane), MODEL))
        planner.submit(Command(future_id(lane, 0), lane, 0, "forward_backward", TenantId(lane), MODEL, 10, 0))
    failed: list[str] = []
    for life in range(MAX_ATTEMPTS + 1):
        actor = ActorId(f"a{life}")
        planner.add_actor(actor, MODEL, CAPACITY)
        plans = []
        while plan := planner.next_micro_batch(actor):
            plans.append(plan)
        together = [sorted(command.lane for command in plan.commands) for plan in plans]
        if life == 0:
            assert together == [["innocent", "poison"]]
        for plan in plans:
            if any(command.lane == "poison" for command in plan.commands):
                assert life == 0 or len(plan.commands) == 1
                break
            for command in plan.commands:
                planner.complete(command.future, plan.batch, 10)
            planner.batch_done(actor, plan.batch)
        lost = planner.actor_lost(actor, ())
        failed += [command.lane for command in lost.poisoned]
        for lane in lost.lanes:
            planner.restore(lane, [])
        if failed:
            break
    assert "poison" in failed


def test_nobody_is_blamed_for_what_ran_beside_it() -> None:
    """Neither the step behind a command that kills, nor another run, nor a sample: however often all die together."""
    planner, lanes = Planner(), [LaneId("poison"), LaneId("innocent")]
    for lane in lanes:
        planner.add_lane(Lane(lane, TenantId(lane), MODEL))
        for seq, kind in enumerate(("forward_backward", "optim_step")):
            planner.submit(Command(future_id(lane, seq), lane, seq, kind, TenantId(lane), MODEL, 10, 0))
    sampler = LaneId("sampler")
    planner.submit(Command(future_id(sampler, 0), sampler, 0, "sample", TENANTS[0], MODEL, 10, 1))
    failed: list[str] = []
    for life in range(MAX_ATTEMPTS):
        actor = ActorId(f"a{life}")
        planner.add_actor(actor, MODEL, CAPACITY)
        held: list[Plan] = []
        while plan := planner.next_micro_batch(actor):
            if life == MAX_ATTEMPTS - 1 and plan.commands[0].future != "poison:0":
                for command in plan.commands:
                    planner.complete(command.future, plan.batch, 10)
                planner.batch_done(actor, plan.batch)
            else:
                held.append(plan)
        lost = planner.actor_lost(actor, ())
        failed += [command.future for command in lost.poisoned]
        for lane in lost.lanes:
            planner.restore(lane, [])
    assert failed == ["poison:0"]


def suspected(*others: LaneId) -> tuple[Planner, LaneId, ActorId]:
    """A planner with a command that may be handed out once more, as soon as its lane is restored, and a new actor."""
    planner, suspect, actor = Planner(), LaneId("suspect"), ActorId("last")
    for lane in (suspect, *others):
        planner.add_lane(Lane(lane, TenantId(lane), MODEL))
    planner.submit(Command(future_id(suspect, 0), suspect, 0, "forward_backward", TenantId(suspect), MODEL, 10, 0))
    for life in range(MAX_ATTEMPTS - 1):
        planner.add_actor(ActorId(f"a{life}"), MODEL, CAPACITY)
        assert planner.next_micro_batch(ActorId(f"a{life}")) is not None
        planner.actor_lost(ActorId(f"a{life}"), ())
        if life < MAX_ATTEMPTS - 2:
            planner.restore(suspect, [])
    planner.add_actor(actor, MODEL, CAPACITY)
    return planner, suspect, actor


def test_nobody_is_blamed_for_weights_that_were_still_being_written() -> None:
    """A save's batch gives its credit back when its weights are copied; it is in flight until they are on disk."""
    saving = LaneId("saving")
    planner, suspect, actor = suspected(saving)
    planner.submit(Command(future_id(saving, 0), saving, 0, "save_weights_for_sampler", TENANTS[1], MODEL, 1, 0))
    save = planner.next_micro_batch(actor)
    assert save is not None
    planner.batch_done(actor, save.batch)
    planner.restore(suspect, [])
    assert planner.next_micro_batch(actor) is None
    planner.complete(save.commands[0].future, save.batch, 1)
    alone = planner.next_micro_batch(actor)
    assert alone is not None and [command.lane for command in alone.commands] == [suspect]


def test_nobody_is_blamed_for_the_death_of_an_actor_that_it_never_reached() -> None:
    planner, suspect, actor = suspected()
    planner.restore(suspect, [])
    for life in range(MAX_ATTEMPTS):
        alone = planner.next_micro_batch(actor)
        assert alone is not None and alone.alone
        lost = planner.actor_lost(actor, {alone.batch})
        assert lost.lanes == (suspect,) and not lost.poisoned
        planner.restore(suspect, [])
        planner.add_actor(actor := ActorId(f"next{life}"), MODEL, CAPACITY)
    assert planner.next_micro_batch(actor) is not None
    assert [command.lane for command in planner.actor_lost(actor, ()).poisoned] == [suspect]


def test_nobody_is_blamed_for_what_was_taken_back_from_an_actor_that_is_not_done_with_it() -> None:
    other = LaneId("other")
    planner, suspect, actor = suspected(other)
    planner.submit(Command(future_id(other, 0), other, 0, "forward_backward", TENANTS[1], MODEL, 10, 0))
    batch = planner.next_micro_batch(actor)
    assert batch is not None
    planner.take_back(other)
    planner.restore(suspect, [])
    assert planner.next_micro_batch(actor) is None
    planner.batch_done(actor, batch.batch)
    alone = planner.next_micro_batch(actor)
    assert alone is not None and [command.lane for command in alone.commands] == [suspect]
