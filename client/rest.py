"""Questions about runs, checkpoints and usage, and the deletion of checkpoints. Nothing here computes."""

from ..wire.catalogue_messages import DeleteCheckpoint, Query
from ..wire.types import Checkpoint, TrainingRun, UsageRow
from .connection import Connection


class RestClient:
    """All answers are about the tenant whose key the connection uses."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def list_training_runs_async(self) -> list[TrainingRun]:
        return await self._connection.ask(Query(self._connection.next_request(), "runs"), list[TrainingRun])

    async def list_checkpoints_async(self, training_run_id: str | None = None) -> list[Checkpoint]:
        query = Query(self._connection.next_request(), "checkpoints", training_run_id)
        return await self._connection.ask(query, list[Checkpoint])

    async def delete_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        await self._connection.tell(DeleteCheckpoint(self._connection.next_request(), tinker_path))

    async def get_usage_async(self) -> list[UsageRow]:
        """Tokens by run and kind, as they are billed."""
        return await self._connection.ask(Query(self._connection.next_request(), "usage"), list[UsageRow])
