"""Which commands run next, together, where. Pure and synchronous: no socket, clock, thread or database.

The broker tells it what happened (`ledger`) and asks `next_micro_batch`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from types import MappingProxyType
from typing import Literal

from ...wire.commands import PHASES, SAMPLING_KINDS
from ...wire.ids import ActorId, BatchId, FutureId, LaneId
from .devices import DeviceShares
from .lanes import COMPUTE, Command, Lane
from .ledger import MAX_ATTEMPTS, Ledger, blamed_for
from .limits import Holder
from .pools import Actor, Held, Pool
from .spreading import parts_for


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


class Planner(Ledger):
    """What one actor would train for longer than `spread_after_s`, as far as is known, is divided among those of its
    model that have nothing to train; see `spreading`. `spreads` counts how often."""

    def __init__(self, spread_after_s: float = inf, model_weights: Mapping[str, float] = MappingProxyType({})) -> None:
        super().__init__()
        self._spread_after_s = spread_after_s
        self._devices = DeviceShares(model_weights)
        self._held_back = set[ActorId]()
        self._batches = self.spreads = 0

    def look_again_after(self, now: float) -> float:
        """Seconds after which a model that is held back on its device may go on; infinity where none is. To be called
        before work is handed out, and after."""
        if not self._devices:
            return inf
        actors = [actor for actor in self._actors.values() if actor.device and not actor.is_leaving]
        shared = {actor.device for actor in actors}
        for device in shared:
            here = [actor for actor in actors if actor.device == device]
            working = {actor.base_model for actor in here if actor.is_working}
            waits = (actor for actor in here if self._pools[actor.base_model].waits and not actor.finds_nothing)
            busy = working | {actor.base_model for actor in waits}
            self._devices.passed(device, busy, working, now)
        held = {actor.id: self._devices.held_back(actor.device, actor.base_model) for actor in actors}
        freed = self._held_back - {id_ for id_, seconds in held.items() if seconds}
        self._held_back = {id_ for id_, seconds in held.items() if seconds}
        return 0.0 if freed else min((seconds for seconds in held.values() if seconds), default=inf)

    def next_micro_batch(self, actor_id: ActorId) -> Plan | None:
        """Work for this actor, or None where it has all it can take or nothing waits for it."""
        actor = self._actors[actor_id]
        if actor.is_leaving or (self._devices and self._devices.held_back(actor.device, actor.base_model)):
            return None
        plan = self._next_micro_batch(actor)
        actor.finds_nothing = plan is None and not actor.is_working
        return plan

    def _next_micro_batch(self, actor: Actor) -> Plan | None:
        if self._attempts:
            if any(holder is actor and self._is_last_chance(c) for c, holder, *_ in self._in_flight.values()):
                return None
            if command := self._last_chance(actor):
                return None if self._holds_anything(actor) else self._alone(actor, command)
        return self._next_train(actor) or self._next_samples(actor)

    def _holds_anything(self, actor: Actor) -> bool:
        """A batch may have given its credit back, and one of its saves is being written still. And one that was taken
        back may kill the actor all the same, until it says that it is done with it."""
        return bool(actor.train_batches) or any(held.actor is actor for held in self._in_flight.values())

    def _is_last_chance(self, command: Command) -> bool:
        return self._attempts.get(blamed_for(command).future, 0) == MAX_ATTEMPTS - 1

    def _last_chance(self, actor: Actor) -> Command | None:
        """The next command of which it would be known that it kills actors, should it kill this one."""
        pool = self._pools[actor.base_model]
        for lane in map(self._lanes.__getitem__, pool.ready):
            if (head := lane.head()) and self._is_last_chance(head) and self._belongs(lane, actor, pool):
                return head
        for part in pool.parts:
            if self._is_last_chance(part) and self._may_take(actor, part):
                return part
        return next((c for queue in pool.samples.values() for c in queue if self._is_last_chance(c)), None)

    def _alone(self, actor: Actor, command: Command) -> Plan | None:
        """That, and neither a step behind it nor anything else until it is over."""
        pool = self._pools[actor.base_model]
        if command.kind in SAMPLING_KINDS:
            pool.samples[command.tenant].remove(command)
            actor.sample_rows += command.rows
            pool.shares.charge(command.tenant, command.cost)
            return self._plan(actor, "sample", [command])
        if command in pool.parts:
            return self._part(actor, command, pool)
        lane = self._lanes[command.lane]
        return self._plan(actor, "train", self._handed_out(lane, [lane.take_head()], actor, pool))

    def _next_train(self, actor: Actor) -> Plan | None:
        if (room := actor.room) <= 0:
            return None
        pool = self._pools[actor.base_model]
        candidates = {i: self._lanes[i] for i in pool.ready if self._belongs(self._lanes[i], actor, pool)}
        taken: dict[LaneId, list[Command]] = {}
        budget = min(actor.capacity.token_budget, room)
        if (part := self._next_part(actor, candidates.values(), pool)) is not None:
            return None if actor.train_batches and part.cost > budget else self._part(actor, part, pool)
        were_waiting = len(pool.parts)
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
            if (parts := self._parts_of(head, actor, pool)) > 1:
                del candidates[lane.id]
                if commands := self._spread_out(lane, parts, actor, pool):
                    taken.setdefault(lane.id, []).extend(commands)
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
        if not taken and len(pool.parts) > were_waiting:
            return self._next_train(actor)
        return self._plan(actor, "train", [command for commands in taken.values() for command in commands])

    def _parts_of(self, head: Command, actor: Actor, pool: Pool) -> int:
        """Among how many actors it is to be divided."""
        is_new = head.may_spread and not head.replay and head.share is None and head.future not in self._attempts
        if not is_new or PHASES[head.kind] != COMPUTE:
            return 1
        free = sum(1 for other in pool.staying if other is actor or not other.train_batches)
        if self._spread_after_s == 0:
            return free
        if (pace := actor.tokens_per_s) is None:
            return 1
        return parts_for(head.cost / pace, self._spread_after_s, free)

    def _spread_out(self, lane: Lane, parts: int, actor: Actor, pool: Pool) -> list[Command]:
        """What home, this actor, is to do first, if anything."""
        self.spreads += 1
        are_published = lane.weights is not None
        spread = lane.spread_out(self.spreads, parts)
        if not are_published:
            return self._handed_out(lane, [spread.publishing()], actor, pool)
        self._note_ready(lane)
        pool.parts.extend(spread.all_parts())
        return []

    def _next_part(self, actor: Actor, candidates: Iterable[Lane], pool: Pool) -> Command | None:
        """That this actor may take, where its tenant is the next."""
        if not pool.parts:
            return None
        first = {part.tenant: part for part in reversed(pool.parts) if self._is_for(actor, part, pool)}
        return first.get(pool.shares.least_served([*first, *(lane.tenant for lane in candidates)])) if first else None

    def _is_for(self, actor: Actor, part: Command, pool: Pool) -> bool:
        """Who has nothing to train comes first."""
        if not self._may_take(actor, part):
            return False
        idle = (other for other in pool.staying if not other.train_batches)
        return not actor.train_batches or not any(self._may_take(other, part) for other in idle)

    def _may_take(self, actor: Actor, part: Command) -> bool:
        """One part of a command at a time, so that others find some."""
        return not any(
            holder is actor and command.share is not None and command.lane == part.lane
            for command, holder, *_ in self._in_flight.values()
        )

    def _part(self, actor: Actor, part: Command, pool: Pool) -> Plan | None:
        pool.parts.remove(part)
        pool.shares.charge(part.tenant, part.cost)
        return self._plan(actor, "train", [part])

    def _next_lane(self, candidates: Iterable[Lane], pool: Pool) -> Lane:
        """Of the tenant that was served least: the lane of the highest priority, then the one that waits longest."""
        tenant = pool.shares.least_served(lane.tenant for lane in candidates)
        return max((lane for lane in candidates if lane.tenant == tenant), key=lambda lane: lane.priority)

    def _handed_out(self, lane: Lane, commands: list[Command], actor: Actor, pool: Pool) -> list[Command]:
        lane.home = actor.id
        actor.homed.add(lane.id)
        for command in commands:
            if not command.replay:
                pool.shares.charge(command.tenant, command.cost)
        pool.ready.pop(lane.id, None)
        self._note_ready(lane)
        return commands

    def _next_samples(self, actor: Actor) -> Plan | None:
        pool = self._pools[actor.base_model]
        commands: list[Command] = []
        waiting = {tenant for tenant, queue in pool.samples.items() if queue}
        under_way = self._sampled_at_once() if self.meters.limits_rows() else Counter[Holder]()
        while waiting and actor.sample_rows < actor.capacity.sample_rows:
            tenant = pool.shares.least_served(sorted(waiting))
            command = self._next_within_limits(pool.samples[tenant], under_way)
            if command is None or pool.sampler_for(command) is not actor:
                waiting.remove(tenant)
                continue
            pool.samples[tenant].remove(command)
            under_way.update(dict.fromkeys(command.holders, command.rows))
            pool.prefixes.computed(command.prefix, actor.id)
            if not pool.samples[tenant]:
                waiting.remove(tenant)
            commands.append(command)
            actor.sample_rows += command.rows
            pool.shares.charge(tenant, command.cost)
        return self._plan(actor, "sample", commands)

    def _sampled_at_once(self) -> Counter[Holder]:
        """Sequences under way, of whatever model."""
        rows = Counter[Holder]()
        for command, *_ in self._in_flight.values():
            rows.update(dict.fromkeys(command.holders, command.rows))
        return rows

    def _next_within_limits(self, queue: Iterable[Command], under_way: Counter[Holder]) -> Command | None:
        """Of one tenant's. Whoever's oldest does not fit waits for that one, which else might wait for ever."""
        full = set[Holder]()
        for command in queue:
            if command.holders and command.holders[0] in full:
                return None
            if full.isdisjoint(command.holders):
                if (holder := self._full_for(command, under_way)) is None:
                    return command
                full.add(holder)
        return None

    def _full_for(self, command: Command, under_way: Counter[Holder]) -> Holder | None:
        """Who has as much under way already as it may, so that the command waits."""
        for holder in command.holders:
            most = self.meters.rows_at_most(holder)
            if most is not None and under_way[holder] and under_way[holder] + command.rows > most:
                return holder
        return None

    def held_back_by(self, future: FutureId, base_model: str) -> str | None:
        """Which limit a sample waits for: itself, or an older one of the same holder's."""
        if not self.meters.limits_rows():
            return None
        under_way, full = self._sampled_at_once(), dict[Holder, str]()
        for queue in self._pools[base_model].samples.values():
            for command in queue:
                reason = next((full[holder] for holder in command.holders if holder in full), None)
                if reason is None and (holder := self._full_for(command, under_way)) is not None:
                    has, most = under_way[holder], self.meters.rows_at_most(holder)
                    asks = f"and {command.future} asks for {command.rows} more"
                    reason = full[holder] = f"concurrent_samples is {has}, {asks}; the limit of {holder} is {most}"
                if command.future == future:
                    return reason
        return None

    def _plan(self, actor: Actor, mode: Literal["train", "sample"], commands: list[Command]) -> Plan | None:
        if not commands:
            return None
        self._batches += 1
        batch = BatchId(self._batches)
        cost = sum(command.cost for command in commands)
        alone = any(blamed_for(command).future in self._attempts for command in commands)
        if mode == "train":
            actor.train_batches[batch] = cost
        for command in commands:
            deaths = self._attempts.get(blamed_for(command).future, 0)
            self._in_flight[command.future] = Held(command, actor, batch, deaths)
        return Plan(batch, actor.id, mode, tuple(commands), cost, alone)

    def _belongs(self, lane: Lane, actor: Actor, pool: Pool) -> bool:
        """A homed lane runs at its home; a new one goes to the actor that homes the fewest."""
        if lane.home is not None:
            return lane.home == actor.id
        return len(actor.homed) <= min(len(other.homed) for other in pool.staying)
