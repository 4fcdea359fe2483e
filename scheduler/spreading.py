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
    parts: set[str] = field(default_factory=set[str])


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
        self._life = secrets.token_hex(4)
        self._folders: dict[LaneId, _Folders] = {}

    def item(self, command: Command, share: Share, row: CommandRow, run: RunRow) -> Item:
        """What an actor is told of its share."""
        folders, adapter = self._folders.setdefault(command.lane, _Folders()), None
        weights = self._folder(run, f"weights-{share.weights}")
        parts = [self._folder(run, f"{share.spread}-{i}") for i in range(share.parts)]
        if share.stage == "publish":
            self._publishes(folders, weights)
            told = wire.Share("publish", [weights])
        elif share.stage == "part":
            folders.parts.add(parts[share.index])
            self._keep(parts[share.index])
            told = wire.Share("part", [parts[share.index]], share.index, share.parts)
            adapter = AdapterState(f"{run.id}/part", run.lora, weights)
        else:
            told = wire.Share("gather", parts)
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
                self._forget_parts(self._folders[command.lane])
                self._finishing.finish(outcome, payload, actor)
        self._work_arrived()

    def finished(self, command: Command) -> None:
        """Weights that its run has no more need not stay published."""
        if command.kind in CHANGES_WEIGHTS:
            self.forget([command.lane])

    def forget(self, lanes: Iterable[LaneId]) -> None:
        """Nobody will read what was written of these runs."""
        for folders in (self._folders.pop(lane) for lane in lanes if lane in self._folders):
            self._forget_parts(folders)
            if folders.weights is not None:
                self._let_go(folders.weights)

    def _publishes(self, folders: _Folders, weights: str) -> None:
        if folders.weights is not None:
            self._let_go(folders.weights)
        folders.weights = weights
        self._keep(weights)

    def _forget_parts(self, folders: _Folders) -> None:
        for part in folders.parts:
            self._let_go(part)
        folders.parts.clear()

    def _folder(self, run: RunRow, name: str) -> str:
        return str(self._checkpoints / run.id / "spread" / f"{self._life}-{name}")
