"""What was accepted and is not over, and what stands in a run's way. It holds; it decides and does nothing."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from ..storage.rows import CommandRow
from ..wire.commands import SAMPLING_KINDS, CommandKind
from ..wire.errors import LorryError
from ..wire.ids import FutureId, LaneId, TenantId
from .planning.deadlines import Deadlines
from .planning.lanes import Command
from .planning.limits import Holder, Meters, holders_of
from .streams import Streams

Queue: TypeAlias = tuple[TenantId, str, CommandKind]
"""Whose, of which model, and what."""
Sort: TypeAlias = tuple[str, CommandKind]
"""Of which model, and what."""


class Payloads:
    """Of commands that wait for their turn, up to `limit` bytes: what is not here is in the journal alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._held: dict[FutureId, bytes] = {}

    def hold(self, future: FutureId, payload: bytes) -> None:
        """If there is room."""
        if self._bytes + len(payload) <= self._limit:
            self.let_go(future)
            self._held[future] = payload
            self._bytes += len(payload)

    def get(self, future: FutureId) -> bytes | None:
        return self._held.get(future)

    def let_go(self, future: FutureId) -> None:
        self._bytes -= len(self._held.pop(future, b""))


@dataclass(slots=True)
class OpenCommands:
    """`payloads` are those at hand; `meters` know who has how much. `replays` are rebuilding a
    run. `ending` are to end with this error when they are
    journalled, or when their actor has let go of them. `broken` runs are lost, and why. `dormant` ones have
    a state that nobody holds: they are rebuilt when their next command comes, not before. `counts` and `tokens` are of
    the rows, and `accepted_at` are their times by model and kind, the oldest first, so that nobody has to walk them.
    `worked` is told whose commands have become more or fewer."""

    payloads: Payloads
    meters: Meters
    worked: Callable[[TenantId], None]
    rows: dict[FutureId, CommandRow] = field(default_factory=dict[FutureId, CommandRow])
    by_tenant: dict[TenantId, dict[FutureId, CommandRow]] = field(
        default_factory=dict[TenantId, dict[FutureId, CommandRow]]
    )
    replays: dict[FutureId, CommandRow] = field(default_factory=dict[FutureId, CommandRow])
    ending: dict[FutureId, LorryError] = field(default_factory=dict[FutureId, LorryError])
    deadlines: Deadlines = field(default_factory=Deadlines)
    broken: dict[LaneId, str] = field(default_factory=dict[LaneId, str])
    dormant: set[LaneId] = field(default_factory=set[LaneId])
    streams: Streams = field(default_factory=Streams)
    counts: Counter[Queue] = field(default_factory=Counter[Queue])
    tokens: Counter[Queue] = field(default_factory=Counter[Queue])
    accepted_at: dict[Sort, dict[FutureId, float]] = field(default_factory=dict[Sort, dict[FutureId, float]])

    def add(self, row: CommandRow) -> None:
        self.rows[row.future] = row
        self.by_tenant.setdefault(row.tenant, {})[row.future] = row
        self._count(row, 1)
        self.accepted_at.setdefault((row.base_model, row.kind), {})[row.future] = row.accepted_at
        self.meters.opened(holders(row), row.lane, row.tokens)
        if row.deadline is not None:
            self.deadlines.add(row.future, row.deadline)
        self.worked(row.tenant)

    def forget(self, future: FutureId) -> None:
        row = self.rows.pop(future)
        self.by_tenant[row.tenant].pop(future)
        if not self.by_tenant[row.tenant]:
            del self.by_tenant[row.tenant]
        self._count(row, -1)
        del self.accepted_at[row.base_model, row.kind][future]
        self.meters.closed(holders(row), row.lane, row.tokens)
        self.payloads.let_go(future)
        self.ending.pop(future, None)
        self.deadlines.over(future)
        if row.arguments.stream:
            self.streams.over(future)
        self.worked(row.tenant)

    def _count(self, row: CommandRow, one: int) -> None:
        queue = (row.tenant, row.base_model, row.kind)
        self.counts[queue] += one
        self.tokens[queue] += one * row.tokens
        if not self.counts[queue]:
            del self.counts[queue], self.tokens[queue]


def holders(row: CommandRow) -> tuple[Holder, ...]:
    """Whose limits it counts for."""
    return holders_of(row.tenant, row.key, row.project)


def planned(row: CommandRow, *, replay: bool = False, priority: int = 0) -> Command:
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
        prefix=row.prefix,
        holders=holders(row) if row.kind in SAMPLING_KINDS else (),
        priority=priority,
    )
