"""Which commands wait, and who holds which: what happened so far. Pure; it decides nothing.

The broker tells it (`submit`, `complete`, `batch_done`, `actor_lost`...); `planner` decides by it.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ...wire.actor_messages import Capacity
from ...wire.commands import SAMPLING_KINDS, CommandKind
from ...wire.ids import ActorId, BatchId, FutureId, LaneId, TenantId
from .fairness import Shares
from .lanes import Command, Lane
from .limits import Meters, tenant_holder
from .pools import Actor, Before, Held, Load, Pool, Run, Waiting
from .queue import Queue

MAX_ATTEMPTS = 3
"""How many actors may die while they hold a command before it is taken to be the cause. The last of them had nothing
else, so that nobody is blamed for what ran beside it."""


@dataclass(frozen=True, slots=True)
class Lost:
    """After an actor's death: `lanes` whose state is to be restored, commands that have killed too many actors, and
    lanes that cannot be restored, because their replay did."""

    lanes: tuple[LaneId, ...]
    poisoned: tuple[Command, ...]
    broken: tuple[LaneId, ...]


class Ledger:
    def __init__(self) -> None:
        self.meters = Meters()
        self._weights: dict[TenantId, float] = {}
        self._pools = defaultdict[str, Pool](lambda: Pool(Shares(self._weights)))
        self._lanes: dict[LaneId, Lane] = {}
        self._actors: dict[ActorId, Actor] = {}
        self._in_flight: dict[FutureId, Held] = {}
        self._attempts: dict[FutureId, int] = {}

    # What happened ---------------------------------------------------------------------------------------------------

    def add_lane(self, lane: Lane) -> None:
        self._lanes[lane.id] = lane

    def set_weight(self, tenant: TenantId, weight: float) -> None:
        """From now on, of whatever model; see `Shares`."""
        if not weight > 0:
            raise ValueError(f"weight of {tenant} is {weight}, expected a number above 0")
        self._weights[tenant] = weight

    def set_priority(self, tenant: TenantId, base_model: str, lane: LaneId, priority: int) -> None:
        """Of a run or a sampler, from now on, and of what waits already."""
        if run := self._lanes.get(lane):
            run.priority = priority
            return
        if queue := self._pools[base_model].samples.get(tenant):
            queue.prioritise(lane, priority)
        for future, held in list(self._in_flight.items()):  # should its actor die
            if held.command.lane == lane:
                self._in_flight[future] = held._replace(command=replace(held.command, priority=priority))

    def add_actor(self, actor: ActorId, base_model: str, capacity: Capacity, device: str = "") -> None:
        added = Actor(actor, base_model, capacity, device=device)
        self._actors[actor] = self._pools[base_model].actors[actor] = added

    def measured(self, actor: ActorId, tokens_per_s: float) -> None:
        """What it has trained lately."""
        if actor in self._actors:
            self._actors[actor].tokens_per_s = tokens_per_s

    def retire(self, actor: ActorId) -> None:
        """It is leaving: nothing is handed out to it any more. What it holds will end, or be lost with it."""
        self._actors[actor].is_leaving = True

    def submit(self, command: Command) -> bool:
        """False where the command is known already: sent twice is executed once. Samples count on the caller for that,
        since they are not ordered and a finished one is forgotten here."""
        pool = self._pools[command.base_model]
        if command.kind in SAMPLING_KINDS:
            pool.samples.setdefault(command.tenant, Queue()).append(command)
        else:
            lane = self._lanes[command.lane]
            if not lane.accept(command):
                return False
            self._note_ready(lane)
        pool.shares.work_arrived(command.tenant)
        return True

    def complete(self, future: FutureId, batch: BatchId, tokens: int) -> Command | None:
        """A command ended, after `tokens` in truth. None where nobody waits for that, or not from this batch: it was
        taken back, or has ended before, and must not count again. What becomes of a share is for `share_done` or
        `call_off`."""
        if not self.is_in_flight(future, batch):
            return None
        command, actor, *_ = self._in_flight.pop(future)
        shares = self._pools[command.base_model].shares
        if command.share is not None:
            if command.share.stage == "part":
                shares.charge(command.tenant, max(1, tokens) - command.cost)
                spread = self._lanes[command.lane].spread
                assert spread is not None, command
                spread.charged += max(1, tokens)
            return command
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
        if future in self._in_flight or self.is_spread(future):
            return "in_flight"
        for pool in self._pools.values():
            for tenant, queue in pool.samples.items():
                if command := queue.find(future):
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
        pool.prefixes.forget(actor_id)
        in_flight = [held for held in self._in_flight.values() if held.actor is actor]
        held = [command for command, *_ in in_flight]
        poisoned: list[Command] = []
        broken: set[LaneId] = set()
        for command, _, batch, deaths in in_flight:
            del self._in_flight[command.future]
            pool.shares.charge(command.tenant, 0 if command.replay else -command.cost)
            if batch in unread:
                continue
            blamed = blamed_for(command)
            # Several actors may die of one try at a command that they execute together.
            self._attempts[blamed.future] = max(self._attempts.get(blamed.future, 0), deaths + 1)
            if self._attempts[blamed.future] >= MAX_ATTEMPTS:
                broken.add(command.lane) if command.replay else poisoned.append(blamed)
        for command in reversed(held):
            if command.kind in SAMPLING_KINDS:
                pool.samples.setdefault(command.tenant, Queue()).put_back(command)
            elif command.share is not None and command.share.stage == "part":
                pool.parts.appendleft(command)
        for lane_id in actor.homed:
            self.lose_state(lane_id, [c for c in held if c.lane == lane_id])
        for command in poisoned:
            if self.is_spread(command.future):
                self._end_spread(self._lanes[command.lane])
            else:
                self.cancel(command.future)
            self._attempts.pop(command.future, None)
        return Lost(tuple(sorted(actor.homed - broken)), tuple(poisoned), tuple(sorted(broken)))

    def take_back(self, lane_id: LaneId) -> None:
        """The actor that was to hold this lane's state does not have it, and executes nothing of it: the lane stands
        still until `restore`."""
        lane = self._lanes[lane_id]
        if lane.home is not None:
            self._actors[lane.home].homed.discard(lane_id)
        self.lose_state(lane_id)

    def break_lane(self, lane_id: LaneId) -> list[Command]:
        """The lane's state is gone for good: it hands out nothing any more. Returns what waited in it."""
        lane = self._lanes[lane_id]
        self._recalled(lane, shares_alone=True)
        dropped = lane.break_off()
        self._pools[lane.base_model].ready.pop(lane_id, None)
        for _ in dropped:
            self._pools[lane.base_model].shares.work_left(lane.tenant)
        return dropped

    def lose_state(self, lane_id: LaneId, held: Iterable[Command] = ()) -> None:
        """Nobody holds this lane's state (the broker has just started): it stands still until `restore`. `held` is what
        its actor had when it was lost."""
        lane = self._lanes[lane_id]
        self._give_back(lane)
        lane.lose_state([*held, *self._recalled(lane)])
        self._pools[lane.base_model].ready.pop(lane_id, None)

    def _recalled(self, lane: Lane, *, shares_alone: bool = False) -> list[Command]:
        """What of it is in flight, which does not count any more; and none of its parts waits for an actor."""
        pool = self._pools[lane.base_model]
        of_lane = [command for command, *_ in self._in_flight.values() if command.lane == lane.id]
        held = [command for command in of_lane if command.share is not None or not shares_alone]
        for command in held:
            del self._in_flight[command.future]
            pool.shares.charge(command.tenant, 0 if command.replay else -command.cost)
        pool.parts = deque(part for part in pool.parts if part.lane != lane.id)
        return held

    def restore(self, lane_id: LaneId, replay: list[Command]) -> None:
        lane = self._lanes[lane_id]
        lane.restore(replay)
        self._note_ready(lane)

    def share_done(self, command: Command) -> None:
        """What one actor was to do of a command that several execute has been done."""
        lane, share = self._lanes[command.lane], command.share
        assert share is not None and lane.spread is not None, command
        if share.stage == "publish":
            self._pools[lane.base_model].parts.extend(lane.spread.all_parts())
        elif share.stage == "part":
            lane.spread.left.remove(share.index)
            self._note_ready(lane)
        else:
            self._end_spread(lane)

    def call_off(self, lane_id: LaneId) -> None:
        """It could not be done: the command has changed nothing, and the lane's home is to execute it whole."""
        lane = self._lanes[lane_id]
        self._give_back(lane)
        self._recalled(lane, shares_alone=True)
        lane.call_off()
        self._note_ready(lane)

    def _give_back(self, lane: Lane) -> None:
        """What was charged for parts that come to nothing."""
        if lane.spread is not None:
            self._pools[lane.base_model].shares.charge(lane.tenant, -lane.spread.charged)

    def _end_spread(self, lane: Lane) -> None:
        """Its command is over, whichever way."""
        assert lane.spread is not None, lane.id
        self._recalled(lane, shares_alone=True)
        self._attempts.pop(lane.spread.whole.future, None)
        lane.spread = None
        self._pools[lane.base_model].shares.work_left(lane.tenant)
        self._note_ready(lane)

    # What is known ---------------------------------------------------------------------------------------------------

    def next_seq(self, lane_id: LaneId) -> int:
        return self._lanes[lane_id].next_seq

    def unpublish(self, lane_id: LaneId) -> None:
        """Nobody can read this lane's published weights any more."""
        self._lanes[lane_id].weights = None

    def weights(self, lane_id: LaneId) -> int | None:
        """The number of those that are published and that its state has still."""
        return self._lanes[lane_id].weights

    def queued(self, lane_id: LaneId) -> int:
        return self._lanes[lane_id].queued

    def home(self, lane_id: LaneId) -> ActorId | None:
        """The actor that holds a lane's state."""
        return self._lanes[lane_id].home

    def is_spread(self, future: FutureId) -> bool:
        """Whether several actors execute this command."""
        lane = self._lanes.get(LaneId(future.rpartition(":")[0]))
        return lane is not None and lane.spread is not None and lane.spread.whole.future == future

    def is_in_flight(self, future: FutureId, batch: BatchId) -> bool:
        return future in self._in_flight and self._in_flight[future].batch == batch

    def holder(self, future: FutureId) -> ActorId | None:
        """The actor that holds a command in flight."""
        return self._in_flight[future].actor.id if future in self._in_flight else None

    def waiting(self, base_model: str) -> Waiting:
        pool, held = self._pools[base_model], Counter[LaneId]()
        for command, *_ in self._in_flight.values():
            if command.base_model == base_model:
                held[command.lane] += command.cost
        in_training = sum(cost for lane, cost in held.items() if lane in self._lanes)
        runs = {tenant: self._runs_of(tenant, base_model, held) for tenant in pool.shares.active()}
        samples = {tenant: queue.tokens for tenant, queue in pool.samples.items()}
        return Waiting(runs, samples, in_training, held.total() - in_training)

    def _runs_of(self, tenant: TenantId, base_model: str, held: Mapping[LaneId, int]) -> dict[LaneId, Run]:
        tokens = self.meters.open_tokens(tenant_holder(tenant))
        lanes = (lane for each in tokens if (lane := self._lanes.get(each)) and lane.base_model == base_model)
        return {
            lane.id: Run(max(0, tokens[lane.id] - held.get(lane.id, 0)), lane.queued, lane.priority) for lane in lanes
        }

    def before(self, tenant: TenantId, base_model: str, lane_id: LaneId, future: FutureId, seq: int) -> Before | None:
        """What waits before a command; None for one that does not wait here."""
        if lane := self._lanes.get(lane_id):
            mine = lane.before(seq)
            return Before(len(mine), sum(command.cost for command in mine), lane.priority)
        queue = self._pools[base_model].samples.get(tenant)
        if queue is None or queue.find(future) is None:
            return None
        return Before(requests := queue.before(future), queue.tokens * requests / len(queue), None)

    def is_busy(self, base_model: str, kind: CommandKind) -> bool:
        """Whether anything of the same sort waits or runs: training or sampling."""
        pool = self._pools[base_model]
        if kind in SAMPLING_KINDS:
            return any(pool.samples.values()) or any(actor.sample_rows for actor in pool.actors.values())
        return bool(pool.ready) or any(actor.train_batches for actor in pool.actors.values())

    def load(self, actor_id: ActorId) -> Load:
        actor = self._actors[actor_id]
        return Load(len(actor.homed), sum(actor.train_batches.values()), actor.sample_rows, actor.is_leaving)

    def actors_of(self, base_model: str) -> list[ActorId]:
        """Those that are to stay."""
        return [actor.id for actor in self._pools[base_model].staying]

    def shares(self, base_model: str) -> Shares:
        return self._pools[base_model].shares

    def _note_ready(self, lane: Lane) -> None:
        ready = self._pools[lane.base_model].ready
        if lane.head() is None:
            ready.pop(lane.id, None)
        else:
            ready.setdefault(lane.id)


def blamed_for(command: Command) -> Command:
    """Which is the cause where this one is."""
    return command if command.share is None else command.share.whole
