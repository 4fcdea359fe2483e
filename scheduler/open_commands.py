"""What was accepted and is not over, and what stands in a run's way. It holds; it decides and does nothing."""

from dataclasses import dataclass, field

from ..storage.rows import CommandRow
from ..wire.commands import SAMPLING_KINDS
from ..wire.ids import FutureId, LaneId
from .planning.lanes import Command


@dataclass(slots=True)
class OpenCommands:
    """`payloads` of what came since the broker started; the others are in the journal only. `replays` are rebuilding a
    run. `cancelled` commands were so before they were journalled. `broken` runs are lost, and why. `dormant` ones have
    a state that nobody holds: they are rebuilt when their next command comes, not before."""

    rows: dict[FutureId, CommandRow] = field(default_factory=dict[FutureId, CommandRow])
    payloads: dict[FutureId, bytes] = field(default_factory=dict[FutureId, bytes])
    replays: dict[FutureId, CommandRow] = field(default_factory=dict[FutureId, CommandRow])
    cancelled: set[FutureId] = field(default_factory=set[FutureId])
    broken: dict[LaneId, str] = field(default_factory=dict[LaneId, str])
    dormant: set[LaneId] = field(default_factory=set[LaneId])

    def forget(self, future: FutureId) -> None:
        del self.rows[future]
        self.payloads.pop(future, None)
        self.cancelled.discard(future)


def planned(row: CommandRow, *, replay: bool = False) -> Command:
    """What the planner knows of a command."""
    return Command(
        future=row.future,
        lane=row.lane,
        seq=row.seq,
        kind=row.kind,
        tenant=row.tenant,
        base_model=row.base_model,
        cost=max(1, row.tokens),
        rows=max(1, row.rows) if row.kind in SAMPLING_KINDS else 0,
        replay=replay,
    )
