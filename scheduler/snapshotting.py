"""Snapshots that actors took: each becomes its run's restore point, and what it makes needless goes with the commit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.actor_messages import SnapshotFailed, SnapshotRecorded, SnapshotTaken
from ..wire.ids import ActorId, LaneId, RunId
from .observing.unsaved import Unsaved
from .planning.planner import Planner
from .registry import Registry
from .restore_points import moved_on, snapshot_folder

log = structlog.get_logger("lorry.broker")


class Snapshotting:
    """`offer` gets the folders that may have become nobody's."""

    def __init__(
        self,
        registry: Registry,
        planner: Planner,
        writer: Writer,
        checkpoints: Path,
        now: Callable[[], float],
        offer: Callable[[str], None],
        unsaved: Unsaved,
    ) -> None:
        self._registry, self._planner, self._writer = registry, planner, writer
        self._checkpoints, self._now, self._offer, self._unsaved = checkpoints, now, offer, unsaved

    def taken(self, message: SnapshotTaken, actor: ActorId, tell: Callable[[SnapshotRecorded], object]) -> None:
        """`tell` answers the actor, once the restore point is durable."""
        run = self._registry.run_of(LaneId(message.run))
        if run is None or self._planner.home(LaneId(message.run)) != actor or run.snapshot_folder != message.folder:
            log.warning("a snapshot of a run that lives elsewhere", run=message.run, actor=actor)
            self._offer(message.folder)
            return
        left = (run.former_folder, message.folder)
        run = moved_on(run, message.folder, message.seq, message.replay_s)
        run = replace(run, snapshot_folder=snapshot_folder(self._checkpoints, run.id))
        self._registry.add_run(run)
        self._unsaved.saved(LaneId(run.id), message.seq, self._now())

        def journal(store: Store) -> None:
            store.restore_points_set(run)

        def done(_: None) -> None:
            assert run.snapshot_folder is not None
            tell(SnapshotRecorded(run.id, run.snapshot_folder))
            for folder in left:
                if folder not in (None, run.restore_folder, run.former_folder):
                    self._offer(folder)

        self._writer.write(journal, done)

    def measured(self, run_id: RunId, replay_s: float) -> None:
        """What a replay of the run would cost now."""
        if run := self._registry.run_of(LaneId(run_id)):
            self._registry.add_run(replace(run, replay_s=replay_s))
            self._writer.write(lambda store: store.replay_measured(run_id, replay_s))

    def failed(self, message: SnapshotFailed) -> None:
        now = self._now()
        log.warning("a snapshot could not be written", run=message.run, why=message.reason)
        self._writer.write(lambda store: store.record_event("snapshot failed", message.run, message.reason, now))
