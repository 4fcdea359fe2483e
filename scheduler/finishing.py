"""The second half of a command's life: its result and usage are recorded in one transaction, and its waiters told."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeAlias

from ..storage.rows import CheckpointRow, CommandRow, CommandState, ResultRow, SamplerRow, UsageEntry
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.actor_messages import Outcome
from ..wire.codec import decode, encode
from ..wire.commands import REPLAYED_KINDS, CommandKind
from ..wire.errors import ActorLostError, CommandCancelledError, ErrorInfo, LorryError
from ..wire.ids import ActorId, FutureId, LaneId
from ..wire.metrics import SourcedPoint
from ..wire.types import AuditEvent, UsageKind
from .metrics import Metrics
from .observing.stages import Stages
from .observing.unsaved import Unsaved
from .open_commands import OpenCommands, holders
from .planning.limits import Meters
from .planning.prices import Prices, cost
from .registry import Registry, run_of_path
from .restore_points import moved_on
from .saves import (
    ASKED_WITHIN_S,
    NEWEST_KEPT,
    SAVES,
    moved_to,
    older_than_newest,
    saved_checkpoint,
    saved_kind,
    saved_sampler,
    weights_response,
)
from .telling import told
from .waiters import Waiters

Deliver: TypeAlias = Callable[[Iterable[bytes], FutureId, ErrorInfo | None, bytes], bool]


_Written: TypeAlias = tuple[SourcedPoint | None, list[str], list[CheckpointRow]]
"""What a step of the run has come to; and samplers and checkpoints without a name that newer ones outlived."""
_MEASURED: frozenset[CommandKind] = frozenset(("forward_backward", "optim_step"))
KEEP_LAST = "keep_last"
"""Who deletes what newer ones of its run have taken the place of."""
_CANCELLED = CommandCancelledError.__name__
"""What an actor says of a command that it was told to let go of."""


class Finishing:
    """`offer` gets the folders that may have become nobody's. `tokens` are what was used since the start."""

    def __init__(
        self,
        open_: OpenCommands,
        registry: Registry,
        waiters: Waiters,
        writer: Writer,
        prices: Prices,
        now: Callable[[], float],
        deliver: Deliver,
        offer: Callable[[str], None],
        meters: Meters,
        stages: Stages,
        unsaved: Unsaved,
        metrics: Metrics,
    ) -> None:
        self._open, self._registry, self._waiters, self._writer = open_, registry, waiters, writer
        self._prices, self._now, self._deliver, self._offer, self._meters = prices, now, deliver, offer, meters
        self._stages, self._unsaved, self._metrics = stages, unsaved, metrics
        self._told: set[FutureId] = set()
        self.tokens = Counter[UsageKind]()

    def finish(self, outcome: Outcome, payload: bytes, actor: ActorId) -> None:
        """Record how a command ended, with its usage, and tell its waiters once that is durable."""
        row = self._open.rows[outcome.future]
        error = outcome.error and told(row, outcome.error)
        if error is not None and error.code == _CANCELLED and (why := self._open.ending.get(row.future)):
            error = told(row, why.info)
        if row.lane in self._open.broken:
            error = ActorLostError(self._open.broken[row.lane]).info
        if error is not None:
            state: CommandState = "discarded" if outcome.discarded else "failed"
            result = ResultRow(row.future, encode(error), None)
            self._record(row, result, state, actor, device_s=outcome.device_s, error=error)
            return
        checkpoint, sampler = self._saved(row, outcome)
        if row.kind in SAVES or row.kind == "load_state":
            payload = encode(weights_response(row, sampler))
        usage = self._usage(row, outcome)
        used: dict[UsageKind, int] = {entry.kind: entry.tokens for entry in usage}
        self.tokens.update(used)
        self._stages.used(row, used)
        self._meters.spent(holders(row), sum(entry.cost for entry in usage), self._now())
        result = ResultRow(row.future, None, payload)
        self._record(row, result, "done", actor, usage, checkpoint, sampler, outcome.device_s, outcome=outcome)

    def fail(self, future: FutureId, error: LorryError) -> None:
        """End a command that no actor will end."""
        row = self._open.rows[future]
        shown = told(row, error.info)
        self._record(row, ResultRow(future, encode(shown), None), "failed", None, error=shown)

    def read(self, futures: Iterable[FutureId]) -> None:
        """Whoever wanted these results has them."""
        self._told.update(futures)

    def record_told(self) -> None:
        """Which results somebody has got since the last time. Should this be lost, they are kept for longer."""
        if self._told:
            (told_now, self._told), now = (self._told, set()), self._now()
            self._writer.write(lambda store: store.results_told(told_now, now))

    def tell(self, connections: Iterable[bytes], future: FutureId, error: bytes | None, payload: bytes | None) -> None:
        if self._deliver(connections, future, decode(error, ErrorInfo) if error is not None else None, payload or b""):
            self._told.add(future)

    def _record(
        self,
        row: CommandRow,
        result: ResultRow,
        state: CommandState,
        actor: ActorId | None,
        usage: Iterable[UsageEntry] = (),
        checkpoint: CheckpointRow | None = None,
        sampler: SamplerRow | None = None,
        device_s: float | None = None,
        error: ErrorInfo | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        now = self._now()
        keep_payload = state == "done" and row.kind in REPLAYED_KINDS
        run = self._registry.run_of(row.lane)
        execution = self._stages.ended(row, state, device_s, error and error.code)
        if keep_payload:
            self._unsaved.changed(row.lane, row.seq, now)
        restored = None
        if run is not None and checkpoint is not None and checkpoint.kind == "training":
            restored = moved_on(run, checkpoint.folder, checkpoint.seq)

        measure = self._metrics.of_training(row, outcome) if outcome and run and row.kind in _MEASURED else None

        def journal(store: Store) -> _Written:
            store.command_finished(result, state, actor, usage, now, execution)
            point = measure(store, now) if measure is not None else None
            if not keep_payload:
                store.payload_dropped(row.future)
            if checkpoint is not None:
                store.checkpoint_saved(checkpoint)
                if not checkpoint.ephemeral:
                    store.audited(AuditEvent(now, row.tenant, row.key or "", "checkpoint_created", checkpoint.path))
                for older in beyond:
                    store.checkpoint_deleted(older, now)
                    store.audited(AuditEvent(now, row.tenant, KEEP_LAST, "checkpoint_deleted", older.path))
                if sampler is not None:
                    store.sampler_created(sampler)
                for other in moved:
                    store.sampler_moved(other)
            if restored is not None:
                store.restore_points_set(restored)
            if checkpoint is not None and checkpoint.ephemeral:
                return point, *store.samplers_outlived(checkpoint.run, NEWEST_KEPT, now - ASKED_WITHIN_S)
            return point, [], []

        def done(written: _Written) -> None:
            point, samplers, checkpoints = written
            self._open.forget(row.future)
            self.tell(self._waiters.resolved(row.future), row.future, result.error, result.payload)
            if run is not None and point is not None:
                self._metrics.came(row.tenant, run.id, [point])
            self._gone(samplers, checkpoints)
            for folder in idle:
                self._offer(folder)

        beyond, moved = self._beyond(row, checkpoint), self._moved(row, checkpoint)
        idle = self._left_behind(row, checkpoint) + [older.folder for older in beyond]
        self._registry.saved(row)
        if checkpoint is not None:
            self._registry.add_checkpoint(checkpoint)
            if sampler is not None:
                self._registry.add_sampler(sampler)
        if run is not None and restored is not None:
            self._registry.add_run(restored)
            self._unsaved.saved(row.lane, restored.restore_seq, now)
            idle += [run.former_folder] if run.former_folder else []
        self._writer.write(journal, done, len(result.payload or b""))

    def _moved(self, row: CommandRow, saved: CheckpointRow | None) -> list[SamplerRow]:
        """Those in flight that have the weights which were saved for all such; here from now on."""
        if saved is None or not row.arguments.in_flight:
            return []
        moved = [moved_to(sampler, row) for sampler in self._registry.samplers_in_flight(saved.run)]
        for sampler in moved:
            self._registry.add_sampler(sampler)
        return moved

    def _beyond(self, row: CommandRow, saved: CheckpointRow | None) -> list[CheckpointRow]:
        """Those that a run keeps no longer, since there are enough that are newer; forgotten here."""
        if saved is None or saved.ephemeral or (keeps := self._meters.keeps_last(holders(row))) is None:
            return []
        beyond = older_than_newest(self._registry.checkpoints_of(row.tenant, saved.run), saved, keeps)
        for older in beyond:
            self._registry.remove_checkpoint(older)
        return beyond

    def _gone(self, samplers: Iterable[str], checkpoints: Iterable[CheckpointRow]) -> None:
        """Weights without a name that newer ones have taken the place of."""
        for sampler in samplers:
            self._registry.outlive_sampler(sampler)
        for checkpoint in checkpoints:
            if found := self._registry.existing(checkpoint.path):
                self._registry.remove_checkpoint(found)
            self._offer(checkpoint.folder)

    def _left_behind(self, row: CommandRow, checkpoint: CheckpointRow | None) -> list[str]:
        """The folder of a save that failed, or of the checkpoint whose name this one takes."""
        if row.kind not in SAVES:
            return []
        if checkpoint is None:
            return [row.folder] if row.folder is not None else []
        replaced = self._registry.existing(checkpoint.path)
        return [replaced.folder] if replaced is not None and replaced.folder != checkpoint.folder else []

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
        used: list[UsageKind] = [kind for kind, n in counts.items() if n]
        prices: dict[UsageKind, int] = {kind: self._prices.of(row.base_model, kind) for kind in used}
        return [
            UsageEntry(
                row.future,
                kind,
                row.tenant,
                run,
                row.base_model,
                counts[kind],
                price,
                cost(counts[kind], price),
                row.key,
                row.project,
            )
            for kind, price in prices.items()
        ]

    def _saved(self, row: CommandRow, outcome: Outcome) -> tuple[CheckpointRow | None, SamplerRow | None]:
        """What a save has made; its sampler may have been there before."""
        run = self._registry.run_of(row.lane)
        if run is None or row.kind not in SAVES:
            return None, None
        sampler = saved_sampler(row, run, self._now())
        if sampler is not None:
            sampler = self._registry.sampler_of(LaneId(sampler.id)) or sampler
        kept_for_s = self._meters.kept_for_s(holders(row), saved_kind(row))
        return saved_checkpoint(row, run, outcome, self._now(), kept_for_s), sampler
