"""What goes on, told to who asks: commands that are not over and why, actors, tokens. It changes nothing.

It walks what waits, but tells of a bounded number, and lets others have the loop between two.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import anyio
import anyio.lowlevel

from ..storage.rows import ActorRow, CommandRow
from ..storage.writer import Writer
from ..wire.actor_messages import ActorPing
from ..wire.catalogue_messages import FutureState, OwnJobs
from ..wire.errors import NotFoundError
from ..wire.ids import ActorId, FutureId, LaneId, RunId, TenantId
from ..wire.overview import ActorLoad, Job, Jobs, JobsWanted, Overview, QueueLoad
from ..wire.types import UsageKind
from .observing.newsroom import DEPLOYMENT, Newsroom
from .open_commands import OpenCommands
from .planning.planner import Planner
from .registry import Registry, run_of_path

_OLDEST = 8
_QUEUES = 40
_WALKED_AT_ONCE = 2000
"""Rows that are looked at before others have the loop: less than a millisecond's work."""


@dataclass(slots=True)
class _Seen:
    row: ActorRow
    ping: ActorPing
    measured_at: float | None = None


class Overlook:
    def __init__(
        self,
        open_: OpenCommands,
        registry: Registry,
        planner: Planner,
        writer: Writer,
        tokens: dict[UsageKind, int],
        queue_state: Callable[[FutureId], FutureState],
        now: Callable[[], float],
        newsroom: Newsroom,
    ) -> None:
        self._open, self._registry, self._planner, self._writer = open_, registry, planner, writer
        self._tokens, self._queue_state, self._now = tokens, queue_state, now
        self._newsroom = newsroom
        self.counted_since = now()
        self._actors: dict[ActorId, _Seen] = {}
        self._one_at_a_time = anyio.Lock()

    # Actors ----------------------------------------------------------------------------------------------------------

    def joined(self, row: ActorRow) -> None:
        self._actors[row.id] = _Seen(row, ActorPing())
        self._newsroom.changed(DEPLOYMENT, "actors")

    def measured(self, actor: ActorId, ping: ActorPing) -> None:
        if actor in self._actors:
            self._actors[actor].ping, self._actors[actor].measured_at = ping, self._now()
            self._newsroom.stir(DEPLOYMENT)

    def left(self, actor: ActorId) -> None:
        if self._actors.pop(actor, None):
            self._newsroom.changed(DEPLOYMENT, "actors")

    def loads(self) -> list[tuple[ActorLoad, tuple[ActorRow, ActorPing]]]:
        """Of each actor that is there, with what it said when it came and what it said last."""
        return [(self._load(seen), (seen.row, seen.ping)) for seen in self._actors.values()]

    # Answers ---------------------------------------------------------------------------------------------------------

    async def own_jobs(self, tenant: TenantId, asked: OwnJobs) -> Jobs:
        """Raises NotFoundError for a run that is not the tenant's."""
        if asked.run is not None:
            self._registry.lane(tenant, LaneId(asked.run))
        return await self.jobs(
            JobsWanted(tenant, asked.run, asked.base_model, asked.kind, asked.limit, asked.newest),
        )

    def homes(self, runs: Iterable[RunId]) -> dict[RunId, ActorId]:
        """Which actor has the state of a run, of those that one has."""
        there = [run for run in runs if self._registry.run_of(LaneId(run)) is not None]
        found = {run: self._planner.home(LaneId(run)) for run in there}
        return {run: actor for run, actor in found.items() if actor is not None}

    async def jobs(self, wanted: JobsWanted) -> Jobs:
        found: list[CommandRow] = []
        async with self._one_at_a_time:  # each holds all that it walks
            whose = self._open.rows if wanted.tenant is None else self._open.by_tenant.get(wanted.tenant, {})
            rows = list(whose.values())  # in the order in which they were accepted
            for start in range(0, len(rows), _WALKED_AT_ONCE):
                walked = rows[start : start + _WALKED_AT_ONCE]
                found += [row for row in walked if is_wanted(row, self._run_of(row), wanted)]
                await anyio.lowlevel.checkpoint()
            chosen = found[: -wanted.limit - 1 : -1] if wanted.newest else found[: wanted.limit]
            jobs = await self._told(chosen)
        return Jobs(self._now(), len(found) - len(chosen) + len(jobs), jobs)

    async def look(self) -> Overview:
        queues = [QueueLoad(*queue, count, self._open.tokens[queue]) for queue, count in self._open.counts.items()]
        oldest = await self._told(list(islice(self._open.rows.values(), _OLDEST)))
        return Overview(
            at=self._now(),
            counted_since=self.counted_since,
            actors=[self._load(seen) for seen in self._actors.values()],
            loading=[name for name, facts in self._registry.models.all().items() if facts is None],
            commands=len(self._open.rows),
            queued_tokens=sum(queue.tokens for queue in queues),
            queues=sorted(queues, key=lambda queue: queue.tokens, reverse=True)[:_QUEUES],
            tokens=dict(self._tokens),
            oldest=oldest,
            trouble=self._writer.trouble,
        )

    async def _told(self, rows: Iterable[CommandRow]) -> list[Job]:
        """Those that are not over meanwhile: why one waits may take a walk through all that wait before it."""
        told: list[Job] = []
        for row in rows:
            await anyio.lowlevel.checkpoint()
            try:
                state = self._queue_state(row.future)
            except NotFoundError:
                continue
            told.append(
                Job(
                    future=row.future,
                    tenant=row.tenant,
                    project=row.project,
                    lane=row.lane,
                    run=self._run_of(row),
                    base_model=row.base_model,
                    kind=row.kind,
                    tokens=row.tokens,
                    accepted_at=row.accepted_at,
                    state=state.state,
                    reason=state.reason,
                )
            )
        return told

    def _run_of(self, row: CommandRow) -> str | None:
        sampler = self._registry.sampler_of(row.lane)
        return row.lane if sampler is None else run_of_path(sampler.model_path) or None

    def _load(self, seen: _Seen) -> ActorLoad:
        row, load = seen.row, self._planner.load(seen.row.id)
        return ActorLoad(
            actor=row.id,
            base_model=row.base_model,
            device=row.device,
            dtype=row.dtype,
            started_at=row.started_at,
            is_leaving=load.is_leaving,
            runs=load.runs,
            tokens=load.tokens,
            sequences=load.sequences,
            train_s=seen.ping.train_s,
            sample_s=seen.ping.sample_s,
            swaps=seen.ping.swaps,
            measured_at=seen.measured_at,
            slots=row.slots,
            slots_used=seen.ping.slots_used,
            memory_bytes=seen.ping.memory_bytes,
        )


def is_wanted(row: CommandRow, run: str | None, wanted: JobsWanted) -> bool:
    """`run` is the one whose weights it is about."""
    return (
        wanted.tenant in (None, row.tenant)
        and (wanted.run is None or wanted.run in (row.lane, run))
        and wanted.base_model in (None, row.base_model)
        and wanted.kind in (None, row.kind)
    )
