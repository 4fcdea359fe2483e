"""Questions about runs, checkpoints and usage, and the deletion of checkpoints. Nothing here computes."""

from collections.abc import Mapping
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
from ..wire.commands import CommandKind
from ..wire.ids import FutureId, LaneId, ProjectId
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
