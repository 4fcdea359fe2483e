"""The life of a command: accepted, planned, handed out, finished. Each half has a file; here they are put together.

It joins the pure parts (registry, planner, waiters) with the writer; sockets and the clock are handed in.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

import msgspec

from ..storage.writer import Writer
from ..wire.actor_messages import AdapterState, Item, Outcome
from ..wire.client_messages import Readiness
from ..wire.codec import encode
from ..wire.errors import DeadlineExceededError, LorryError, NotFoundError
from ..wire.ids import ActorId, BatchId, FutureId, KeyId, LaneId, TenantId
from ..wire.limits import Limits
from ..wire.streaming import Resumed
from ..wire.tracing import tracing
from .accepting import Accepting
from .client_post import SoFar
from .config import BrokerConfig
from .exposition import Exposition
from .finishing import Deliver, Finishing
from .metrics import Metrics
from .observing.counts import Counts
from .observing.newsroom import Newsroom
from .observing.spans import Spans
from .observing.stages import Stages
from .observing.unsaved import Unsaved
from .open_commands import OpenCommands, Payloads
from .overview import Overlook
from .planning.lanes import Command
from .planning.ledger import Lost
from .planning.limits import Holder
from .planning.planner import Planner
from .queueing import Queueing
from .recovering import Recovering
from .registry import Registry, no_checkpoint, run_of_path
from .saves import weights_gone
from .spreading import Spreading
from .sweeping import Sweeper
from .waiters import Waiters

StreamTo: TypeAlias = Callable[[bytes, Iterable[tuple[FutureId, bytes]], SoFar], None]
"""Tells a connection tokens of samples that are not over."""

_LATE_AT_ONCE, _WITH_A_REASON = 200, 10
"""Why one waits may take a walk through all that wait before it, and nobody else is served meanwhile."""


class Commands:
    def __init__(
        self,
        registry: Registry,
        planner: Planner,
        writer: Writer,
        config: BrokerConfig,
        now: Callable[[], float],
        deliver: Deliver,
        work_arrived: Callable[[], None],
        sweeper: Sweeper,
        stream_to: StreamTo,
    ) -> None:
        self.waiters = Waiters()
        self.meters = planner.meters
        self.counts, self.unsaved = Counts(), Unsaved()
        self._stages = Stages(self.counts, Spans(tracing, now), now)
        self.newsroom = Newsroom()
        registry.on_change = self.newsroom.changed
        self.metrics = Metrics(registry, writer, self.newsroom, now)
        self._open = OpenCommands(Payloads(config.waiting_bytes), self.meters, self.newsroom.worked)
        self._registry, self._planner, self._writer = registry, planner, writer
        self._work_arrived, self._stream_to = work_arrived, stream_to
        self.queueing = Queueing(self._open, registry, planner, writer, now)
        self.finishing = Finishing(
            self._open,
            registry,
            self.waiters,
            writer,
            config.prices,
            now,
            deliver,
            sweeper.offer,
            self.meters,
            self._stages,
            self.unsaved,
            self.metrics,
        )
        self.recovering = Recovering(
            self._open,
            registry,
            planner,
            writer,
            self.finishing,
            config.checkpoints,
            now,
            work_arrived,
            self.counts,
            self.unsaved,
        )
        self.spreading = Spreading(
            planner, self.finishing, config.checkpoints, work_arrived, sweeper.keep, sweeper.let_go
        )
        self.overview = Overlook(
            self._open, registry, planner, writer, self.finishing.tokens, self.queueing.state, now, self.newsroom
        )
        self.accepting = Accepting(
            self._open,
            registry,
            planner,
            self.waiters,
            writer,
            self.finishing,
            self.recovering,
            config.checkpoints,
            now,
            work_arrived,
            self._stages,
        )
        self.exposition = Exposition(
            self.counts, self._open, registry, planner, writer, self.overview, self.unsaved, now
        )

    def set_weight(self, tenant: TenantId, weight: float) -> None:
        self._planner.set_weight(tenant, weight)

    def set_priority(self, tenant: TenantId, base_model: str, lane: LaneId, priority: int) -> None:
        self._planner.set_priority(tenant, base_model, lane, priority)

    def set_limits(self, holder: Holder, limits: Limits) -> None:
        """From now on; what waited for a narrower one may go on."""
        self.meters.set(holder, limits)
        self._work_arrived()

    def goes_on(self, lane: LaneId) -> bool:
        """Whether something of a run or a sampler is under way, or is next and there. Else what waits there may wait
        for ever, for a request that its client never sends, or for a model that nobody serves any more."""
        if (run := self._registry.run_of(lane)) is None:
            sampler = self._registry.sampler_of(lane)
            return sampler is not None and bool(self._planner.actors_of(sampler.base_model))
        return bool(self._planner.actors_of(run.base_model)) and any(
            FutureId(f"{lane}:{seq}") in self._open.rows for seq in (self.next_seq(lane), self.next_seq(lane) - 1)
        )

    def waits_for_its_next(self, lane: LaneId) -> bool:
        """Whether a run's next request has not come."""
        if self._registry.run_of(lane) is None:
            return False
        return FutureId(f"{lane}:{self.next_seq(lane)}") not in self._open.rows

    def waiting(self, tenant: TenantId | None) -> int:
        """How many commands are not over: the tenant's, or everybody's."""
        return len(self._open.rows if tenant is None else self._open.by_tenant.get(tenant, ()))

    def next_seq(self, lane: LaneId) -> int:
        return self._planner.next_seq(lane)

    def readiness(self) -> Readiness:
        """One that no actor serves at the moment counts as loading."""
        usable = self._registry.models.all()
        ready = sum(facts is not None and bool(self._planner.actors_of(name)) for name, facts in usable.items())
        return Readiness(ready, len(usable) - ready, self._registry.models.failures)

    # Handing out -----------------------------------------------------------------------------------------------------

    def item(self, command: Command) -> Item:
        """What the actor is told of a command."""
        rows = self._open.replays if command.replay else self._open.rows
        row = rows[command.future if command.share is None else command.share.whole.future]
        if run := self._registry.run_of(command.lane):
            if command.share is not None:
                return self.spreading.item(command, command.share, row, run)
            if row.kind == "load_state" and row.folder is None:
                raise no_checkpoint(row.arguments.path)
            return Item(
                command.future,
                command.kind,
                AdapterState(run.id, run.lora, run.restore_folder, run.snapshot_folder),
                row.folder,
                row.arguments.optimizer,
                discard=row.state == "discarded",
                seq=row.seq,
            )
        sampler = self._registry.sampler_of(command.lane)
        if sampler is None:
            raise NotFoundError(f"sampler {command.lane!r} was not used for a day, and its weights are gone")
        if sampler.outlived:
            raise weights_gone(sampler)
        if sampler.folder is None:
            return Item(command.future, command.kind, None, scope=command.tenant, stream=row.arguments.stream)
        source = self._registry.run_of(LaneId(run_of_path(sampler.model_path)))
        assert source is not None, "runs are never deleted"
        folder = row.folder or sampler.folder  # of one in flight, what it had when the command was accepted
        state = AdapterState(folder, source.lora, folder)
        return Item(command.future, command.kind, state, stream=row.arguments.stream)

    def handed_out(
        self, actor: ActorId, mode: Literal["train", "sample"], commands: Sequence[Command]
    ) -> dict[FutureId, str]:
        """They are on their way to an actor, together. Returns which spans the actor's are to be children of."""
        tokens, lanes = sum(command.cost for command in commands), {command.lane for command in commands}
        self.counts.micro_batch(mode, len(commands), tokens, len(lanes))
        parents: dict[FutureId, str] = {}
        for command in commands:
            if not command.replay:
                whole = command if command.share is None else command.share.whole
                row, in_part = self._open.rows[whole.future], command.share is not None
                if parent := self._stages.handed_out(row, actor, in_part=in_part):
                    parents[command.future] = parent
        return parents

    def payload(self, command: Command) -> bytes | FutureId:
        """What goes with it; or whose payload does, which is in the journal only."""
        if command.share is not None and command.share.stage != "part":
            return b""
        future = command.future if command.share is None else command.share.whole.future
        payload = self._open.payloads.get(future)
        return future if payload is None else payload

    def begun(self, item: Item, payload: bytes) -> tuple[Item, bytes]:
        """A sample with what another actor made of it, and with that told: it goes on from there."""
        if not (made := self._open.streams.so_far(item.future)):
            return item, payload
        return msgspec.structs.replace(item, resumed=True), encode(Resumed(payload, made))

    def made(self, futures: Iterable[FutureId], payloads: Iterable[bytes], actor: ActorId) -> None:
        """Tokens of samples that this actor holds are told to who waits for them."""
        told: list[tuple[FutureId, bytes]] = []
        for future, pieces in zip(futures, payloads, strict=True):
            row = self._open.rows.get(future)
            if row is not None and row.arguments.stream and self._planner.holder(future) == actor:
                self._open.streams.made(future, pieces)
                told.append((future, pieces))
        self._stream(told)

    def made_so_far(self, future: FutureId) -> list[bytes]:
        return self._open.streams.so_far(future)

    def _stream(self, told: Iterable[tuple[FutureId, bytes]]) -> None:
        """Each connection gets one message."""
        by_connection: dict[bytes, list[tuple[FutureId, bytes]]] = {}
        for future, pieces in told:
            for connection in self.waiters.of(future):
                by_connection.setdefault(connection, []).append((future, pieces))
        for connection, some in by_connection.items():
            self._stream_to(connection, some, self._open.streams.so_far)

    # Ending ----------------------------------------------------------------------------------------------------------

    def finish(self, outcome: Outcome, payload: bytes, actor: ActorId, batch: BatchId) -> None:
        if outcome.unrestored and outcome.error and self._planner.is_in_flight(outcome.future, batch):
            lane = LaneId(outcome.future.rpartition(":")[0])
            self.spreading.forget([lane])
            self.recovering.unrestored(lane, outcome.error.message)
            return
        tokens = outcome.prefill_tokens + outcome.sample_tokens + outcome.train_tokens
        command = self._planner.complete(outcome.future, batch, tokens)
        if command is None:
            return
        if not command.replay and command.share is None:
            self.queueing.ended(self._open.rows[command.future], command.cost)
        if command.replay:
            self.recovering.replayed(command, outcome)
            if command.lane in self._open.broken:
                self.spreading.forget([command.lane])
        elif command.share is not None:
            self.spreading.ended(command, command.share, outcome, payload, actor)
        else:
            self.spreading.finished(command)
            self.finishing.finish(outcome, payload, actor)

    def actor_lost(self, actor: ActorId, lost: Lost) -> None:
        self._stages.actor_lost(actor)
        self.spreading.forget([*lost.lanes, *lost.broken])
        self.spreading.forget_parts(command.lane for command in lost.poisoned)
        self.recovering.actor_lost(lost)
        for future, error in list(self._open.ending.items()):  # it was to let go of them
            if self._planner.cancel(future) == "dropped":
                self.finishing.fail(future, error)

    def end(self, future: FutureId, error: LorryError) -> ActorId | None:
        """A command that waits ends with `error`; returns the actor to tell where it is in flight. One that is over
        stays so."""
        if future not in self._open.rows:
            return None
        outcome = self._planner.cancel(future)
        if outcome == "dropped":
            self.finishing.fail(future, error)
        else:  # on its way into the journal, or with an actor
            self._open.ending.setdefault(future, error)
        return self._planner.holder(future)

    def end_asked_with(self, key: KeyId, error: LorryError) -> list[tuple[FutureId, ActorId]]:
        """End all that came with a key and is not over; returns what an actor is to be told of."""
        futures = [row.future for row in self._open.rows.values() if row.key == key]
        ended = [(future, self.end(future, error)) for future in futures]
        self._work_arrived()
        return [(future, actor) for future, actor in ended if actor is not None]

    def late(self, now: float) -> list[tuple[FutureId, ActorId]]:
        """End some of what should be over by now; returns what an actor is to be told of. What is left is due still."""
        told: list[tuple[FutureId, ActorId]] = []
        for number, future in enumerate(self._open.deadlines.passed(now, _LATE_AT_ONCE)):
            row = self._open.rows[future]
            why = self.queueing.state(future).reason if number < _WITH_A_REASON else "as did others, it waited"
            error = DeadlineExceededError(f"{future} was not over {row.timeout_s:g} s after it was accepted: {why}")
            if (actor := self.end(future, error)) is not None:
                told.append((future, actor))
        self._work_arrived()
        return told

    def next_deadline(self) -> float | None:
        """In Unix seconds."""
        return self._open.deadlines.next_at()
