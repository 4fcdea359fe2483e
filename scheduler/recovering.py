"""Rebuilding the runs whose state died with an actor: from the last saved state, by the commands after it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from ..storage.rows import CommandRow
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.actor_messages import Outcome
from ..wire.errors import ActorKilledError, ActorLostError
from ..wire.ids import LaneId
from .finishing import Finishing
from .observing.counts import Counts
from .observing.unsaved import Unsaved
from .open_commands import OpenCommands, planned
from .planning.lanes import Command
from .planning.ledger import MAX_ATTEMPTS, Lost
from .planning.planner import Planner
from .registry import Registry
from .restore_points import fallen_back, snapshot_folder

log = structlog.get_logger("lorry.broker")


class Recovering:
    def __init__(
        self,
        open_: OpenCommands,
        registry: Registry,
        planner: Planner,
        writer: Writer,
        finishing: Finishing,
        checkpoints: Path,
        now: Callable[[], float],
        work_arrived: Callable[[], None],
        counts: Counts,
        unsaved: Unsaved,
    ) -> None:
        self._open, self._registry, self._planner, self._writer = open_, registry, planner, writer
        self._finishing, self._checkpoints, self._now = finishing, checkpoints, now
        self._work_arrived, self._counts, self._unsaved = work_arrived, counts, unsaved

    def actor_lost(self, lost: Lost) -> None:
        """What the dead actor held goes on elsewhere."""
        for command in lost.poisoned:
            problem = f"{MAX_ATTEMPTS} actors died while they had {command.future} in flight"
            self._finishing.fail(command.future, ActorKilledError(problem))
        for lane in lost.broken:
            self._break(lane, f"run {lane} could not be rebuilt: its replay kills actors")
        self._open.dormant.update(lost.lanes)
        for lane in lost.lanes:
            if self._planner.queued(lane):
                self.wake(lane)
        self._work_arrived()

    def wake(self, lane: LaneId) -> None:
        """Rebuild the run if nobody holds its state: something waits for it."""
        if lane in self._open.dormant:
            self._open.dormant.remove(lane)
            self._restore(lane)

    def unrestored(self, lane: LaneId, why: str) -> None:
        """The folder of a run's newest saved state does not give it back: it is rebuilt from the one before."""
        self._planner.take_back(lane)
        run = self._registry.run_of(lane)
        assert run is not None, lane
        if (older := fallen_back(run)) is None:
            self._break(lane, f"run {lane} could not be rebuilt: {why}")
            return
        log.error("a saved state cannot be read", run=lane, folder=run.restore_folder, why=why)
        now = self._now()

        def journal(store: Store) -> None:
            store.restore_points_set(older)
            store.record_event("saved state unreadable", lane, why, now)

        self._registry.add_run(older)
        self._writer.write(journal)
        self._restore(lane)

    def replayed(self, command: Command, outcome: Outcome) -> None:
        """A command of a replay ended. Its result is known already; that it fails now is the end of its run."""
        self._open.replays.pop(command.future, None)
        if outcome.error:
            self._break(command.lane, f"run {command.lane} could not be rebuilt: {outcome.error.message}")

    def _restore(self, lane: LaneId) -> None:
        found = self._registry.run_of(lane)
        assert found is not None, lane
        run = replace(found, snapshot_folder=snapshot_folder(self._checkpoints, found.id))
        self._registry.add_run(run)  # whoever held it before may still write to the folder that it was given
        before = self._planner.next_seq(lane)

        def read(store: Store) -> list[CommandRow]:
            store.restore_points_set(run)
            return store.replayable_commands(run.id, run.restore_seq, before)

        def done(rows: list[CommandRow]) -> None:
            self._open.replays.update((row.future, row) for row in rows)
            self._planner.restore(lane, [planned(row, replay=True) for row in rows])
            self._counts.restored(run.base_model, len(rows))
            log.info("restoring", run=run.id, folder=run.restore_folder, replayed=len(rows))
            self._work_arrived()

        # Through the writer, so that it sees all that was completed before the actor died.
        self._writer.write(read, done)

    def _break(self, lane: LaneId, why: str) -> None:
        log.error("run broken", run=lane, why=why)
        self._open.broken[lane] = why
        self._unsaved.forget(lane)
        for command in self._planner.break_lane(lane):
            self._finishing.fail(command.future, ActorLostError(why))
