"""Questions about runs, checkpoints and usage, and the deletion of checkpoints. Nothing here computes."""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import IO, Literal

from anyio import to_thread

from ..wire.catalogue_messages import (
    AssignProject,
    CheckpointFilter,
    DeleteCheckpoint,
    DeleteCheckpoints,
    FindRuns,
    FutureState,
    OwnJobs,
    Query,
    QueueState,
    SessionTimeline,
    SetPriority,
)
from ..wire.codec import encode
from ..wire.commands import CommandKind
from ..wire.ids import FutureId, LaneId, ProjectId, RunId
from ..wire.lineage import Descent
from ..wire.metrics import LogMetrics, MetricPlace, MetricPoint, ReadMetrics, RunMetrics, SourcedPoint, in_messages
from ..wire.overview import Jobs
from ..wire.timelines import Timeline
from ..wire.types import Checkpoint, Project, TrainingRun, UsageRow
from .connection import Connection
from .session_trace import SessionTrace


class RestClient:
    """All answers are about the tenant whose key the connection uses."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def list_training_runs_async(
        self,
        project: str | None = None,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> list[TrainingRun]:
        """All, or those of a project, of a base model, and whose metadata has all of these pairs."""
        sought = ProjectId(project) if project is not None else None
        find = FindRuns(self._connection.next_request(), sought, base_model, dict(user_metadata or {}))
        return await self._connection.ask(find, list[TrainingRun])

    async def list_projects_async(self) -> list[Project]:
        return await self._connection.ask(Query(self._connection.next_request(), "projects"), list[Project])

    async def assign_session_project_async(self, session_id: str, project: str) -> None:
        """Also the runs and samplers that were made in it; what they used stays where it was used. The project is made
        if new. Raises NotFoundError, InvalidRequestError for a name that cannot be one."""
        await self._connection.tell(AssignProject(self._connection.next_request(), session_id, ProjectId(project)))

    async def set_priority_async(self, lane: str, priority: int) -> None:
        """Of a run or a sampler, by its id: of a tenant's work that waits, what has the highest goes first. It is from
        -100 to 100, and 0 where nothing was said. Raises NotFoundError, InvalidRequestError."""
        await self._connection.tell(SetPriority(self._connection.next_request(), LaneId(lane), priority))

    async def get_queue_state_async(self, future: str) -> FutureState:
        """Why a future has not resolved yet, by its id: what is before it, and for about how long. Raises NotFoundError
        where it has, or never was."""
        return await self._connection.ask(QueueState(self._connection.next_request(), FutureId(future)), FutureState)

    async def list_checkpoints_async(self, training_run_id: str | None = None) -> list[Checkpoint]:
        query = Query(self._connection.next_request(), "checkpoints", training_run_id)
        return await self._connection.ask(query, list[Checkpoint])

    async def delete_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        await self._connection.tell(DeleteCheckpoint(self._connection.next_request(), tinker_path))

    async def delete_checkpoints_async(
        self,
        run: str | None = None,
        project: str | None = None,
        kind: Literal["training", "sampler", "external"] | None = None,
        older_than_s: float | None = None,
        user_metadata: Mapping[str, str] | None = None,
        but_newest: int | None = None,
        public: bool = False,
        only_tell: bool = False,
    ) -> list[Checkpoint]:
        """Delete all checkpoints with names that have all of what is said, but for the newest `but_newest` of each run
        and kind, and those that are published, unless `public`. Returns them; `only_tell` deletes none.

        Raises InvalidRequestError where nothing is said.
        """
        sought = ProjectId(project) if project is not None else None
        chosen = CheckpointFilter(run, sought, kind, older_than_s, dict(user_metadata or {}), but_newest, public)
        request = DeleteCheckpoints(self._connection.next_request(), chosen, only_tell)
        return await self._connection.ask(request, list[Checkpoint])

    async def get_usage_async(self) -> list[UsageRow]:
        """Tokens by run and kind, as they are billed."""
        return await self._connection.ask(Query(self._connection.next_request(), "usage"), list[UsageRow])

    async def export_trace_async(self, subject: str, file: IO[bytes]) -> None:
        """Write what became of a run's commands, and when, to `file`, for https://ui.perfetto.dev; or of a client
        session's. Raises NotFoundError."""
        trace, after = SessionTrace(file, subject), None
        while True:
            asked = SessionTimeline(self._connection.next_request(), subject, after)
            page = await self._connection.ask(asked, Timeline)
            await to_thread.run_sync(trace.add, page.commands)
            if (after := page.after) is None:
                return

    async def list_jobs_async(
        self,
        run: str | None = None,
        base_model: str | None = None,
        kind: CommandKind | None = None,
        limit: int = 50,
        newest: bool = False,
    ) -> Jobs:
        """The tenant's commands that are not over, and why, of a run or a sampler, a base model or a kind: the `limit`
        oldest, 1 to 200, or the newest. Raises NotFoundError for a run or a sampler that is not there."""
        asked = OwnJobs(self._connection.next_request(), run, base_model, kind, limit, newest)
        return await self._connection.ask(asked, Jobs)

    # Numbers, and where weights came from ----------------------------------------------------------------------------

    async def log_run_metrics_async(self, training_run_id: str, points: Iterable[MetricPoint]) -> None:
        """What `TrainingClient.log_metrics` does, for many steps, of any of the tenant's runs. Raises NotFoundError,
        InvalidRequestError, LimitReachedError; what came before what is wrong is kept, in thousands of points."""
        for some in in_messages(points):
            message = LogMetrics(self._connection.next_request(), RunId(training_run_id))
            await self._connection.tell(message, encode(some))

    async def get_run_metrics_async(
        self, training_run_id: str, at_most_points: int | None = None, names: Sequence[str] | None = None
    ) -> list[SourcedPoint]:
        """A run's numbers by step: what its training came to, and what was logged beside. All in memory, or thinned to
        `at_most_points` for each name, from 4 to 10,000, for a plot. Raises NotFoundError."""
        if at_most_points is None:
            return [point async for page in self.run_metrics_pages(training_run_id, names) for point in page]
        asked = self._asked(training_run_id, names, None, at_most_points)
        return (await self._connection.ask(asked, RunMetrics)).points

    async def list_metric_names_async(self, training_run_id: str) -> list[str]:
        """Of all numbers that a run has. Raises NotFoundError."""
        query = Query(self._connection.next_request(), "metric_names", training_run_id)
        return await self._connection.ask(query, list[str])

    async def run_metrics_pages(
        self, training_run_id: str, names: Sequence[str] | None = None
    ) -> AsyncGenerator[list[SourcedPoint]]:
        """All of a run's numbers, a thousand points at a time at most. Raises NotFoundError."""
        after = None
        while True:
            page = await self._connection.ask(self._asked(training_run_id, names, after), RunMetrics)
            yield page.points
            if (after := page.next) is None:
                return

    def _asked(
        self,
        run: str,
        names: Sequence[str] | None,
        after: MetricPlace | None,
        at_most_points: int | None = None,
    ) -> ReadMetrics:
        wanted = None if names is None else list(names)
        return ReadMetrics(
            self._connection.next_request(), RunId(run), after, at_most_points=at_most_points, names=wanted
        )

    async def get_lineage_async(self, training_run_id: str | None = None) -> list[Descent]:
        """What came into the tenant's runs, or into one: loads, copies and imports, in their order. Raises
        NotFoundError."""
        query = Query(self._connection.next_request(), "lineage", training_run_id)
        return await self._connection.ask(query, list[Descent])
