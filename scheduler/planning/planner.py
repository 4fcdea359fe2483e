"""Which commands run next, together, where. Pure and synchronous: no socket, clock, thread or database.

The broker tells it what happened (`submit`, `complete`, `batch_done`, `actor_lost`...) and asks `next_micro_batch`.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from ...wire.actor_messages import Capacity
from ...wire.commands import PHASES, SAMPLING_KINDS
from ...wire.ids import ActorId, BatchId, FutureId, LaneId, TenantId
from .fairness import Shares
from .lanes import COMPUTE, Command, Lane

MAX_ATTEMPTS = 3
"""How many actors may die while they hold a command before it is taken to be the cause. The last of them had nothing
else, so that nobody is blamed for what ran beside it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A micro-batch: a lane's commands stand together, in order. `cost` is in tokens; one that is `alone` holds a
    command that was in flight when an actor died, and the actor is to run it with nothing else."""

    batch: BatchId
    actor: ActorId
    mode: Literal["train", "sample"]
    commands: tuple[Command, ...]
    cost: int
    alone: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """After an actor's death: `lanes` whose state is to be restored, commands that have killed too many actors, and
    lanes that cannot be restored, because their replay did."""

    lanes: tuple[LaneId, ...]
    poisoned: tuple[Command, ...]
    broken: tuple[LaneId, ...]


@dataclass(slots=True)
class _Actor:
    id: ActorId
    base_model: str
    capacity: Capacity
    train_batches: dict[BatchId, int] = field(default_factory=dict)
    sample_rows: int = 0
    homed: set[LaneId] = field(default_factory=set)
    is_leaving: bool = False


@dataclass(slots=True)
class _Pool:
    """Everything of one base model. `ready` holds lanes with a head, in the order in which they became ready."""

    shares: Shares = field(default_factory=Shares)
    actors: dict[ActorId, _Actor] = field(default_factory=dict)
    ready: dict[LaneId, None] = field(default_factory=dict)
    samples: dict[TenantId, deque[Command]] = field(default_factory=dict)


class Planner:
    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}
        self._lanes: dict[LaneId, Lane] = {}
        self._actors: dict[ActorId, _Actor] = {}
        self._in_flight: dict[FutureId, tuple[Command, _Actor, BatchId]] = {}
        self._attempts: dict[FutureId, int] = {}
        self._batches = 0

    # What happened ---------------------------------------------------------------------------------------------------

    def add_lane(self, lane: Lane) -> None:
        self._lanes[lane.id] = lane

    def add_actor(self, actor: ActorId, base_model: str, capacity: Capacity) -> None:
        self._actors[actor] = self._pool(base_model).actors[actor] = _Actor(actor, base_model, capacity)

    def retire(self, actor: ActorId) -> None:
        """It is leaving: nothing is handed out to it any more. What it holds will end, or be lost with it."""
        self._actors[actor].is_leaving = True

    def submit(self, command: Command) -> bool:
        """False where the command is known already: sent twice is executed once. Samples count on the caller for that,
        since they are not ordered and a finished one is forgotten here."""
        pool = self._pool(command.base_model)
        if command.kind in SAMPLING_KINDS:
            pool.samples.setdefault(command.tenant, deque()).append(command)
        else:
            lane = self._lanes[command.lane]
            if not lane.accept(command):
                return False
            self._note_ready(lane)
        pool.shares.work_arrived(command.tenant)
        return True

    def complete(self, future: FutureId, batch: BatchId, tokens: int) -> Command | None:
        """A command ended, after `tokens` in truth. None where nobody waits for that, or not from this batch: it was
        taken back, or has ended before, and must not count again."""
        if not self.is_in_flight(future, batch):
            return None
        command, actor, _ = self._in_flight.pop(future)
        shares = self._pools[command.base_model].shares
        if command.kind in SAMPLING_KINDS:
            actor.sample_rows -= command.rows
        if not command.replay:
            shares.charge(command.tenant, max(1, tokens) - command.cost)
            shares.work_left(command.tenant)
        self._attempts.pop(future, None)
        return command

    def batch_done(self, actor: ActorId, batch: BatchId) -> None:
        """The actor has a credit again."""
        if actor in self._actors:
            self._actors[actor].train_batches.pop(batch, None)

    def cancel(self, future: FutureId) -> Literal["dropped", "in_flight", "unknown"]:
        """Drop a command that waits. One in flight is the actor's business."""
        if future in self._in_flight:
            return "in_flight"
        for pool in self._pools.values():
            for tenant, queue in pool.samples.items():
                if command := next((c for c in queue if c.future == future), None):
                    queue.remove(command)
                    pool.shares.work_left(tenant)
                    return "dropped"
        lane_id, _, seq = future.rpartition(":")
        lane = self._lanes.get(LaneId(lane_id))
        if lane is None or not lane.drop(int(seq)):
            return "unknown"
        self._pools[lane.base_model].shares.work_left(lane.tenant)
        self._note_ready(lane)
        return "dropped"

    def skip(self, lane_id: LaneId, seq: int) -> None:
        """A run's command was refused: those behind it do not wait for it. Samples wait for nobody."""
        if lane := self._lanes.get(lane_id):
            lane.skip((seq,))
            self._note_ready(lane)

    def actor_lost(self, actor_id: ActorId, unread: Collection[BatchId]) -> Lost:
        """Take back all that the actor held. Its lanes stand still until `restore`. It did not die of what was still
        `unread`."""
        actor = self._actors.pop(actor_id)
        pool = self._pools[actor.base_model]
        del pool.actors[actor_id]
        in_flight = [(command, batch) for command, holder, batch in self._in_flight.values() if holder is actor]
        held = [command for command, _ in in_flight]
        poisoned: list[Command] = []
        broken: set[LaneId] = set()
        for command, batch in in_flight:
            del self._in_flight[command.future]
            pool.shares.charge(command.tenant, 0 if command.replay else -command.cost)
            if batch in unread:
                continue
            self._attempts[command.future] = self._attempts.get(command.future, 0) + 1
            if self._attempts[command.future] >= MAX_ATTEMPTS:
                broken.add(command.lane) if command.replay else poisoned.append(command)
        for command in reversed([c for c in held if c.kind in SAMPLING_KINDS]):
            pool.samples.setdefault(command.tenant, deque()).appendleft(command)
        for lane_id in actor.homed:
            self._lanes[lane_id].lose_state(c for c in held if c.lane == lane_id)
            pool.ready.pop(lane_id, None)
        for command in poisoned:
            self.cancel(command.future)
            del self._attempts[command.future]
        return Lost(tuple(sorted(actor.homed - broken)), tuple(poisoned), tuple(sorted(broken)))

    def take_back(self, lane_id: LaneId) -> None:
        """The actor that was to hold this lane's state does not have it, and executes nothing of it: the lane stands
        still until `restore`."""
        lane = self._lanes[lane_id]
        pool = self._pool(lane.base_model)
        held = [command for command, _, _ in self._in_flight.values() if command.lane == lane_id]
        for command in held:
            del self._in_flight[command.future]
            pool.shares.charge(command.tenant, 0 if command.replay else -command.cost)
        if lane.home is not None:
            self._actors[lane.home].homed.discard(lane_id)
        self.lose_state(lane_id, held)

    def break_lane(self, lane_id: LaneId) -> list[Command]:
        """The lane's state is gone for good: it hands out nothing any more. Returns what waited in it."""
        lane = self._lanes[lane_id]
        dropped = lane.break_off()
        self._pools[lane.base_model].ready.pop(lane_id, None)
        for _ in dropped:
            self._pools[lane.base_model].shares.work_left(lane.tenant)
        return dropped

    def lose_state(self, lane_id: LaneId, held: Iterable[Command] = ()) -> None:
        """Nobody holds this lane's state (the broker has just started): it stands still until `restore`."""
        self._lanes[lane_id].lose_state(held)
        self._pool(self._lanes[lane_id].base_model).ready.pop(lane_id, None)

    def restore(self, lane_id: LaneId, replay: list[Command]) -> None:
        lane = self._lanes[lane_id]
        lane.restore(replay)
        self._note_ready(lane)

    # What to do ------------------------------------------------------------------------------------------------------

    def next_micro_batch(self, actor_id: ActorId) -> Plan | None:
        """Work for this actor, or None where it has all it can take or nothing waits for it."""
        actor = self._actors[actor_id]
        if actor.is_leaving:
            return None
        if self._attempts:
            if any(holder is actor and self._is_last_chance(c) for c, holder, _ in self._in_flight.values()):
                return None
            if command := self._last_chance(actor):
                return None if self._holds_anything(actor) else self._alone(actor, command)
        return self._next_train(actor) or self._next_samples(actor)

    def _holds_anything(self, actor: _Actor) -> bool:
        """A batch may have given its credit back, and one of its saves is being written still. And one that was taken
        back may kill the actor all the same, until it says that it is done with it."""
        return bool(actor.train_batches) or any(holder is actor for _, holder, _ in self._in_flight.values())

    def _is_last_chance(self, command: Command) -> bool:
        return self._attempts.get(command.future, 0) == MAX_ATTEMPTS - 1

    def _last_chance(self, actor: _Actor) -> Command | None:
        """The next command of which it would be known that it kills actors, should it kill this one."""
        pool = self._pools[actor.base_model]
        for lane in map(self._lanes.__getitem__, pool.ready):
            if (head := lane.head()) and self._is_last_chance(head) and self._belongs(lane, actor, pool):
                return head
        return next((c for queue in pool.samples.values() for c in queue if self._is_last_chance(c)), None)

    def _alone(self, actor: _Actor, command: Command) -> Plan | None:
        """That, and neither a step behind it nor anything else until it is over."""
        pool = self._pools[actor.base_model]
        if command.kind in SAMPLING_KINDS:
            pool.samples[command.tenant].remove(command)
            actor.sample_rows += command.rows
            pool.shares.charge(command.tenant, command.cost)
            return self._plan(actor, "sample", [command])
        lane = self._lanes[command.lane]
        return self._plan(actor, "train", self._handed_out(lane, [lane.take_head()], actor, pool))

    def _next_train(self, actor: _Actor) -> Plan | None:
        room = actor.capacity.credits * actor.capacity.token_budget - sum(actor.train_batches.values())
        if room <= 0:
            return None
        pool = self._pools[actor.base_model]
        candidates = {i: self._lanes[i] for i in pool.ready if self._belongs(self._lanes[i], actor, pool)}
        taken: dict[LaneId, list[Command]] = {}
        budget = min(actor.capacity.token_budget, room)
        while candidates:
            lane = self._next_lane(candidates.values(), pool)
            head = lane.head()
            assert head is not None
            suspect = head.future in self._attempts
            after = PHASES[taken[lane.id][-1].kind] if lane.id in taken else COMPUTE
            full = lane.id not in taken and len(taken) == actor.capacity.slots
            if full or not lane.fits(after) or (suspect and taken):
                del candidates[lane.id]
                continue
            if (taken or actor.train_batches) and head.cost > budget:
                break
            commands = self._handed_out(lane, lane.take(after), actor, pool)
            taken.setdefault(lane.id, []).extend(commands)
            budget -= sum(command.cost for command in commands)
            if suspect:
                break
            # The tenant's other runs come first now.
            del candidates[lane.id]
            if lane.head() is not None:
                candidates[lane.id] = lane
        return self._plan(actor, "train", [command for commands in taken.values() for command in commands])

    def _next_lane(self, candidates: Iterable[Lane], pool: _Pool) -> Lane:
        """Of the tenant that was served least: the lane of the highest priority, then the one that waits longest."""
        tenant = pool.shares.least_served(lane.tenant for lane in candidates)
        return max((lane for lane in candidates if lane.tenant == tenant), key=lambda lane: lane.priority)

    def _handed_out(self, lane: Lane, commands: list[Command], actor: _Actor, pool: _Pool) -> list[Command]:
        lane.home = actor.id
        actor.homed.add(lane.id)
        for command in commands:
            if not command.replay:
                pool.shares.charge(command.tenant, command.cost)
        pool.ready.pop(lane.id, None)
        self._note_ready(lane)
        return commands

    def _next_samples(self, actor: _Actor) -> Plan | None:
        pool = self._pools[actor.base_model]
        commands: list[Command] = []
        waiting = {tenant for tenant, queue in pool.samples.items() if queue}
        while waiting and actor.sample_rows < actor.capacity.sample_rows:
            tenant = pool.shares.least_served(sorted(waiting))
            command = pool.samples[tenant].popleft()
            if not pool.samples[tenant]:
                waiting.remove(tenant)
            commands.append(command)
            actor.sample_rows += command.rows
            pool.shares.charge(tenant, command.cost)
        return self._plan(actor, "sample", commands)

    def _plan(self, actor: _Actor, mode: Literal["train", "sample"], commands: list[Command]) -> Plan | None:
        if not commands:
            return None
        self._batches += 1
        batch = BatchId(self._batches)
        cost = sum(command.cost for command in commands)
        alone = any(command.future in self._attempts for command in commands)
        if mode == "train":
            actor.train_batches[batch] = cost
        for command in commands:
            self._in_flight[command.future] = command, actor, batch
        return Plan(batch, actor.id, mode, tuple(commands), cost, alone)

    def _belongs(self, lane: Lane, actor: _Actor, pool: _Pool) -> bool:
        """A homed lane runs at its home; a new one goes to the actor that homes the fewest."""
        if lane.home is not None:
            return lane.home == actor.id
        return len(actor.homed) <= min(len(other.homed) for other in pool.actors.values() if not other.is_leaving)

    # What is known ---------------------------------------------------------------------------------------------------

    def next_seq(self, lane_id: LaneId) -> int:
        return self._lanes[lane_id].next_seq

    def queued(self, lane_id: LaneId) -> int:
        return self._lanes[lane_id].queued

    def home(self, lane_id: LaneId) -> ActorId | None:
        """The actor that holds a lane's state."""
        return self._lanes[lane_id].home

    def is_in_flight(self, future: FutureId, batch: BatchId) -> bool:
        return future in self._in_flight and self._in_flight[future][2] == batch

    def holder(self, future: FutureId) -> ActorId | None:
        """The actor that holds a command in flight."""
        return self._in_flight[future][1].id if future in self._in_flight else None

    def actors_of(self, base_model: str) -> list[ActorId]:
        """Those that are to stay."""
        return [actor.id for actor in self._pool(base_model).actors.values() if not actor.is_leaving]

    def shares(self, base_model: str) -> Shares:
        return self._pool(base_model).shares

    def _pool(self, base_model: str) -> _Pool:
        return self._pools.setdefault(base_model, _Pool())

    def _note_ready(self, lane: Lane) -> None:
        ready = self._pool(lane.base_model).ready
        if lane.head() is None:
            ready.pop(lane.id, None)
        else:
            ready.setdefault(lane.id)
