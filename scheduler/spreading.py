"""Commands that several actors execute: where their weights and gradients lie, and what follows when a share ends."""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from ..storage.rows import CommandRow, RunRow
from ..wire import actor_messages as wire
from ..wire.actor_messages import AdapterState, Item, Outcome
from ..wire.ids import ActorId, LaneId
from .finishing import Finishing
from .planning.lanes import CHANGES_WEIGHTS, Command
from .planning.planner import Planner
from .planning.spreading import Share

log = structlog.get_logger("lorry.broker")


@dataclass(slots=True)
class _Folders:
    """Of one run: the weights that were published last, and the parts that home has not gathered."""

    weights: str | None = None
    parts: dict[int, str] = field(default_factory=dict[int, str])


class Spreading:
    """Folders are named here before anybody writes them, and kept as long as somebody may read them: the journal knows
    nothing of them, for what is spread begins again after a restart. `keep` and `let_go` are the sweeper's."""

    def __init__(
        self,
        planner: Planner,
        finishing: Finishing,
        checkpoints: Path,
        work_arrived: Callable[[], None],
        keep: Callable[[str], None],
        let_go: Callable[[str], None],
    ) -> None:
        self._planner, self._finishing, self._checkpoints = planner, finishing, checkpoints
        self._work_arrived, self._keep, self._let_go = work_arrived, keep, let_go
        self._life, self._handed_out = secrets.token_hex(4), 0
        self._folders: dict[LaneId, _Folders] = {}

    def item(self, command: Command, share: Share, row: CommandRow, run: RunRow) -> Item:
        """What an actor is told of its share."""
        folders, adapter = self._folders.setdefault(command.lane, _Folders()), None
        weights = self._folder(run, f"weights-{share.weights}")
        if share.stage == "publish":
            self._publishes(folders, weights)
            told = wire.Share("publish", [weights])
        elif share.stage == "part":
            told = wire.Share("part", [self._part(folders, run, share.index)], share.index, share.parts)
            adapter = AdapterState(f"{run.id}/part", run.lora, weights)
        else:
            told = wire.Share("gather", [folders.parts[i] for i in range(share.parts)])
        adapter = adapter or AdapterState(run.id, run.lora, run.restore_folder, run.snapshot_folder)
        return Item(command.future, command.kind, adapter, seq=row.seq, share=told)

    def ended(self, command: Command, share: Share, outcome: Outcome, payload: bytes, actor: ActorId) -> None:
        """What cannot be spread to its end has changed nothing: home executes it whole, and tells what is wrong if it
        is the command's own fault."""
        if outcome.error is not None:
            why = outcome.error.message
            log.warning("a command is not spread after all", command=share.whole.future, stage=share.stage, why=why)
            self._planner.call_off(command.lane)
            self.forget([command.lane])
        else:
            self._planner.share_done(command)
            if share.stage == "gather":
                self.forget_parts([command.lane])
                if not self._planner.queued(command.lane):
                    self._planner.unpublish(command.lane)
                    self.forget([command.lane])
                self._finishing.finish(outcome, payload, actor)
        self._work_arrived()

    def finished(self, command: Command) -> None:
        """Weights that its run has no more need not stay published. Those that it will have then may be already."""
        if command.kind in CHANGES_WEIGHTS and self._planner.weights(command.lane) is None:
            self.forget([command.lane])

    def forget(self, lanes: Iterable[LaneId]) -> None:
        """Nobody will read what was written of these runs."""
        lanes = [lane for lane in lanes if lane in self._folders]
        self.forget_parts(lanes)
        for folders in map(self._folders.pop, lanes):
            if folders.weights is not None:
                self._let_go(folders.weights)

    def forget_parts(self, lanes: Iterable[LaneId]) -> None:
        for folders in (self._folders[lane] for lane in lanes if lane in self._folders):
            for part in folders.parts.values():
                self._let_go(part)
            folders.parts.clear()

    def _publishes(self, folders: _Folders, weights: str) -> None:
        if folders.weights is not None:
            self._let_go(folders.weights)
        folders.weights = weights
        self._keep(weights)

    def _part(self, folders: _Folders, run: RunRow, index: int) -> str:
        """A new one each time that a part is handed out: who was taken for dead may write to the one before."""
        if index in folders.parts:
            self._let_go(folders.parts[index])
        self._handed_out += 1
        folders.parts[index] = self._folder(run, f"part-{self._handed_out}")
        self._keep(folders.parts[index])
        return folders.parts[index]

    def _folder(self, run: RunRow, name: str) -> str:
        return str(self._checkpoints / run.id / "spread" / f"{self._life}-{name}")
