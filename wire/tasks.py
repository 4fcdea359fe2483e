"""A task group for background work that belongs to a block of code and ends with it."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup


@asynccontextmanager
async def background_tasks() -> AsyncGenerator[TaskGroup]:
    """Cancelled when the block ends. An error of the block is raised as it is; one of a task, in an ExceptionGroup.

    A bare task group would wrap both, and a caller could not write `except InvalidRequestError` around the block.
    """
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        try:
            yield tasks
        except Exception as error:  # raised again below, outside the group
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
