"""The life of a command: accepted and journalled, planned, handed out, finished, told to whoever waits.

It joins the pure parts (registry, planner, waiters) with the writer; sockets and the clock are handed in.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import structlog

from ..storage.rows import (
    CheckpointKind,
    CheckpointRow,
    CommandRow,
    ResultRow,
    RunRow,
    SamplerRow,
    UsageEntry,
)
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.actor_messages import AdapterState, Item, Outcome
from ..wire.client_messages import FutureState
from ..wire.codec import decode, encode
from ..wire.commands import SAMPLING_KINDS, CommandKind
from ..wire.errors import ActorLostError, CommandCancelledError, ErrorInfo, LorryError, NotFoundError
from ..wire.ids import ActorId, FutureId, LaneId, RunId, SamplerId
from ..wire.types import LoadWeightsResponse, SaveWeightsForSamplerResponse, SaveWeightsResponse, UsageKind
from .config import BrokerConfig
from .planning.lanes import Command, Lane
from .planning.planner import Lost, Planner
from .planning.prices import cost
from .registry import Registry, checkpoint_path, ephemeral_path, run_of_path, sampler_in_slot
from .waiters import Waiters

log = structlog.get_logger("lorry.broker")

Deliver: TypeAlias = Callable[[Iterable[bytes], FutureId, ErrorInfo | None, bytes], None]
_REPLAYED: frozenset[CommandKind] = frozenset(("forward_backward", "optim_step", "load_state"))
_SAVES: frozenset[CommandKind] = frozenset(("save_state", "save_weights_for_sampler"))


_EPHEMERAL_TTL_S = 24 * 3600
"""How long weights without a name can be sampled from: a training loop makes new ones at every step."""


class Commands:
    def __init__(
        self,
        config: BrokerConfig,
        registry: Registry,
        planner: Planner,
        writer: Writer,
        now: Callable[[], float],
        deliver: Deliver,
        work_arrived: Callable[[], None],
        discard: Callable[[CheckpointRow], None],
    ) -> None:
        self.waiters = Waiters()
        self._config, self._registry, self._planner, self._writer = config, registry, planner, writer
        self._now, self._deliver, self._work_arrived, self._discard = now, deliver, work_arrived, discard
        self._rows: dict[FutureId, CommandRow] = {}
        self._payloads: dict[FutureId, bytes] = {}
        self._unacknowledged: dict[FutureId, list[Callable[[], None]]] = {}
        self._replays: dict[FutureId, CommandRow] = {}
        self._broken: dict[LaneId, str] = {}
        # Runs whose state nobody holds: rebuilt when their next command comes, not before.
        self._dormant: set[LaneId] = set()

    # Accepting -------------------------------------------------------------------------------------------------------

    def load(self, store: Store) -> None:
        """After a start: every run has a lane, nobody holds its state, and what was queued is queued again."""
        finished = store.finished_counts()
        for run in store.runs():
            lane = self.add_run(run)
            count, top = finished.get(lane.id, (0, -1))
            if count == 0:
                continue
            # Usually all that is over is one stretch from the first on; after a cancellation there may be gaps.
            if top == run.first_seq + count - 1:
                lane.next_seq = top + 1
            else:
                lane.skip(store.finished_seqs(lane.id))
            self._planner.lose_state(lane.id)
            self._dormant.add(lane.id)
        for row in store.queued_commands():
            self._rows[row.future] = row
            self.waiters.opened(row.future)
            self._plan(row)

    def add_run(self, run: RunRow) -> Lane:
        self._registry.add_run(run)
        lane = Lane(LaneId(run.id), run.tenant, run.base_model, next_seq=run.first_seq)
        self._planner.add_lane(lane)
        return lane

    def accept(self, row: CommandRow, payload: bytes, connection: bytes, acknowledge: Callable[[], None]) -> None:
        """Journal the command, then acknowledge and plan it. Sent again, it is acknowledged again, and that is all."""
        if self.waiters.is_open(row.future):
            self.waiters.watch(row.future, connection)
            if row.future in self._unacknowledged:
                self._unacknowledged[row.future].append(acknowledge)
            else:
                acknowledge()
            return
        self._rows[row.future], self._payloads[row.future] = row, payload
        self._unacknowledged[row.future] = [acknowledge]
        self.waiters.opened(row.future)
        self.waiters.watch(row.future, connection)
        earlier: list[ResultRow] = []

        def journal(store: Store) -> None:
            if not store.command_accepted(row, payload, self._now()) and (result := store.result(row.future)):
                earlier.append(result)

        self._writer.write(journal, lambda: self._accepted(row, earlier))

    def _accepted(self, row: CommandRow, earlier: list[ResultRow]) -> None:
        for acknowledge in self._unacknowledged.pop(row.future):
            acknowledge()
        if earlier:
            self._forget(row.future)
            error = earlier[0].error
            self.tell(self.waiters.resolved(row.future), row.future, error, earlier[0].payload)
        elif row.lane in self._broken:
            self.fail(row.future, ActorLostError(self._broken[row.lane]))
        else:
            self._plan(row)

    def _plan(self, row: CommandRow) -> None:
        self._planner.submit(_command(row))
        if row.lane in self._dormant:
            self._dormant.remove(row.lane)
            self._restore(row.lane)
        self._work_arrived()

    def next_seq(self, lane: LaneId) -> int:
        return self._planner.next_seq(lane)

    def queue_state(self, future: FutureId) -> FutureState:
        """Why it has not resolved yet. Raises NotFoundError where it has, or never was."""
        if (row := self._rows.get(future)) is None:
            raise NotFoundError(f"{future!r} does not wait for anything", field="future")
        if not self._planner.actors_of(row.base_model):
            return FutureState("paused_capacity", f"no actor serves {row.base_model} at the moment")
        if self._planner.holder(future):
            return FutureState("active", "it is being executed")
        if self._registry.run_of(row.lane) is None:
            return FutureState("active", "it waits for its turn")
        return FutureState("active", f"{row.lane} goes on with request {self._planner.next_seq(row.lane)}")

    # Handing out -----------------------------------------------------------------------------------------------------

    def item(self, command: Command) -> Item:
        """What the actor is told of a command. Raises NotFoundError for weights that are gone by now."""
        row, folder = self._rows[command.future] if not command.replay else self._replays[command.future], None
        if run := self._registry.run_of(command.lane):
            adapter = AdapterState(run.id, run.lora, run.restore_folder)
            if command.kind in _SAVES:
                folder = str(self._folder(row))
            elif command.kind == "load_state":
                folder = self._registry.loadable(run, row.arguments.path).folder
            return Item(command.future, command.kind, adapter, folder, row.arguments.optimizer)
        sampler = self._registry.sampler_of(command.lane)
        if sampler is None or sampler.model_path is None:
            return Item(command.future, command.kind, None, scope=command.tenant)
        checkpoint = self._registry.readable(sampler.tenant, sampler.model_path, "sampler")
        run = self._registry.run(checkpoint.tenant, checkpoint.run)
        return Item(command.future, command.kind, AdapterState(checkpoint.folder, run.lora, checkpoint.folder))

    def payload(self, future: FutureId) -> bytes | None:
        """None where it is in the journal only."""
        return self._payloads.get(future)

    def _folder(self, row: CommandRow) -> Path:
        """A folder for each save, never written twice: a crash between its renaming and the commit of its row leaves
        what was saved before as it was, and what an actor has loaded from a folder never goes stale."""
        return self._config.checkpoints / f"{saved_path(row).removeprefix('tinker://')}.{row.seq}"

    # Finishing -------------------------------------------------------------------------------------------------------

    def finish(self, outcome: Outcome, payload: bytes, actor: ActorId) -> None:
        """Record how a command ended, with its usage, and tell its waiters once that is durable."""
        tokens = outcome.prefill_tokens + outcome.sample_tokens + outcome.train_tokens
        command = self._planner.complete(outcome.future, tokens)
        if command is None:
            return
        if command.replay:
            self._replays.pop(command.future, None)
            if outcome.error:
                self._break(command.lane, f"run {command.lane} could not be rebuilt: {outcome.error.message}")
            return
        row = self._rows[outcome.future]
        error = outcome.error
        if command.lane in self._broken:
            error = ActorLostError(self._broken[command.lane]).info
        checkpoint = self._saved(row, outcome) if error is None else None
        sampler = self._sampler_asked_for(row) if checkpoint is not None else None
        result = payload if error is None else None
        if error is None and (row.kind in _SAVES or row.kind == "load_state"):
            result = encode(_weights_response(row, sampler))
        usage = self._usage(row, outcome) if error is None else []
        encoded = ResultRow(row.future, encode(error) if error else None, result)
        self._record(row, encoded, actor, usage, checkpoint, sampler)

    def fail(self, future: FutureId, error: LorryError) -> None:
        """End a command that no actor will end."""
        self._record(self._rows[future], ResultRow(future, encode(error.info), None), None, [], None)

    def cancel(self, future: FutureId) -> ActorId | None:
        """Drop a command that waits; returns the actor to tell where it is in flight. One that is over stays so."""
        if future not in self._rows:
            return None
        if self._planner.cancel(future) == "dropped":
            self.fail(future, CommandCancelledError(f"{future} was cancelled"))
        return self._planner.holder(future)

    def _record(
        self,
        row: CommandRow,
        result: ResultRow,
        actor: ActorId | None,
        usage: list[UsageEntry],
        checkpoint: CheckpointRow | None,
        sampler: SamplerRow | None = None,
    ) -> None:
        now = self._now()
        keep_payload = result.error is None and row.kind in _REPLAYED
        restores = checkpoint is not None and checkpoint.kind == "training"

        def journal(store: Store) -> None:
            store.command_finished(result, actor, usage, now)
            if not keep_payload:
                store.payload_dropped(row.future)
            if checkpoint is not None:
                store.checkpoint_saved(checkpoint)
                if sampler is not None:
                    store.sampler_created(sampler)
                if restores:
                    store.restore_point_set(checkpoint.run, checkpoint.folder, checkpoint.seq)

        replaced = self._registry.existing(checkpoint.path) if checkpoint is not None else None

        def done() -> None:
            self._forget(row.future)
            self.tell(self.waiters.resolved(row.future), row.future, result.error, result.payload)
            if replaced is not None:
                self._discard(replaced)

        if checkpoint is not None:
            self._registry.add_checkpoint(checkpoint)
            if sampler is not None:
                self._registry.add_sampler(sampler)
            if restores and (run := self._registry.run_of(row.lane)):
                restored = replace(run, restore_folder=checkpoint.folder, restore_seq=checkpoint.seq)
                self._registry.add_run(restored)
        self._writer.write(journal, done)

    def _forget(self, future: FutureId) -> None:
        del self._rows[future]
        self._payloads.pop(future, None)

    def tell(self, connections: Iterable[bytes], future: FutureId, error: bytes | None, payload: bytes | None) -> None:
        self._deliver(connections, future, _error(error), payload or b"")

    def _usage(self, row: CommandRow, outcome: Outcome) -> list[UsageEntry]:
        """Sampling from saved weights counts for the run that saved them; from the bare base model, for none."""
        counts: dict[UsageKind, int] = {
            "prefill": outcome.prefill_tokens - outcome.cached_prefill_tokens,
            "cached_prefill": outcome.cached_prefill_tokens,
            "sample": outcome.sample_tokens,
            "train": outcome.train_tokens,
        }
        sampler = self._registry.sampler_of(row.lane)
        run = row.lane if sampler is None else run_of_path(sampler.model_path)
        prices = {kind: self._config.prices.of(row.base_model, kind) for kind in counts}
        return [
            UsageEntry(row.future, kind, row.tenant, run, row.base_model, n, prices[kind], cost(n, prices[kind]))
            for kind, n in counts.items()
            if n
        ]

    def _saved(self, row: CommandRow, outcome: Outcome) -> CheckpointRow | None:
        run = self._registry.run_of(row.lane)
        if run is None or row.kind not in _SAVES:
            return None
        ephemeral = row.arguments.sampler_slot is not None
        ttl = row.arguments.ttl_seconds or (_EPHEMERAL_TTL_S if ephemeral else None)
        return CheckpointRow(
            path=saved_path(row),
            run=run.id,
            tenant=run.tenant,
            kind=_saved_kind(row),
            name=row.arguments.name or "",
            folder=str(self._folder(row)),
            seq=row.seq,
            size_bytes=outcome.size_bytes,
            checksum=outcome.checksum,
            created_at=self._now(),
            expires_at=None if ttl is None else self._now() + ttl,
            ephemeral=ephemeral,
            user_metadata=row.arguments.user_metadata,
        )

    def _sampler_asked_for(self, row: CommandRow) -> SamplerRow | None:
        """The sampler of the weights that this command saved; None where it was not asked for, or was made before."""
        run, slot = self._registry.run_of(row.lane), row.arguments.sampler_slot
        if run is None or run.session is None or slot is None:
            return None
        sampler = SamplerId(sampler_in_slot(run.session, slot))
        made = self._registry.sampler_of(LaneId(sampler))
        return made or SamplerRow(
            id=sampler,
            tenant=run.tenant,
            nonce=sampler,
            base_model=run.base_model,
            model_path=saved_path(row),
            created_at=self._now(),
            session=run.session,
        )

    # Recovering ------------------------------------------------------------------------------------------------------

    def actor_lost(self, lost: Lost) -> None:
        """Rebuild what the dead actor held, elsewhere: from the last saved state, by the commands after it."""
        for command in lost.poisoned:
            self.fail(command.future, ActorLostError(f"{command.future} was in flight each time that an actor died"))
        for lane in lost.broken:
            self._break(lane, f"run {lane} could not be rebuilt: its replay kills actors")
        self._dormant.update(lost.lanes)
        for lane in lost.lanes:
            if self._planner.queued(lane):
                self._dormant.remove(lane)
                self._restore(lane)
        self._work_arrived()

    def _restore(self, lane: LaneId) -> None:
        run = self._registry.run_of(lane)
        assert run is not None, lane
        rows: list[CommandRow] = []
        before = self._planner.next_seq(lane)

        def read(store: Store) -> None:
            rows.extend(store.replayable_commands(run.id, run.restore_seq, before))

        def done() -> None:
            self._replays.update((row.future, row) for row in rows)
            self._planner.restore(lane, [replace(_command(row), replay=True) for row in rows])
            log.info("restoring", run=run.id, folder=run.restore_folder, replayed=len(rows))
            self._work_arrived()

        # Through the writer, so that it sees all that was completed before the actor died.
        self._writer.write(read, done)

    def _break(self, lane: LaneId, why: str) -> None:
        log.error("run broken", run=lane, why=why)
        self._broken[lane] = why
        for command in self._planner.break_lane(lane):
            self.fail(command.future, ActorLostError(why))


def saved_path(row: CommandRow) -> str:
    """Where a save puts its checkpoint. Raises InvalidRequestError for a name that cannot be one."""
    if row.arguments.sampler_slot is not None:
        return ephemeral_path(RunId(row.lane), row.seq)
    return checkpoint_path(RunId(row.lane), _saved_kind(row), row.arguments.name)


def _saved_kind(row: CommandRow) -> CheckpointKind:
    if row.kind == "save_state":
        return "training"
    return "external" if row.arguments.external else "sampler"


def _weights_response(row: CommandRow, sampler: SamplerRow | None) -> object:
    if row.kind == "load_state":
        return LoadWeightsResponse(row.arguments.path or "")
    if row.kind == "save_state":
        return SaveWeightsResponse(saved_path(row))
    return SaveWeightsForSamplerResponse(saved_path(row), sampler.id if sampler else None)


def _command(row: CommandRow) -> Command:
    return Command(
        future=row.future,
        lane=row.lane,
        seq=row.seq,
        kind=row.kind,
        tenant=row.tenant,
        base_model=row.base_model,
        cost=max(1, row.tokens),
        rows=max(1, row.rows) if row.kind in SAMPLING_KINDS else 0,
    )


def _error(encoded: bytes | None) -> ErrorInfo | None:
    return decode(encoded, ErrorInfo) if encoded is not None else None
