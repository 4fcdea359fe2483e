"""The promise of a command's result. It outlives the connection that asked for it, and never polls."""

from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeAlias, TypeVar

import anyio

from ..wire.ids import FutureId

T = TypeVar("T")

Cancel: TypeAlias = Callable[[FutureId], Awaitable[None]]


class Future(Generic[T]):
    """Await it for the result; the error of a failed command is raised there. It can be awaited any number of times.

    Cancelling the task that awaits leaves the command alone; `cancel` asks the server to drop it.
    """

    def __init__(self, id: FutureId, convert: Callable[[bytes], T], cancel: Cancel) -> None:
        self.id = id
        self._convert, self._cancel = convert, cancel
        self._resolved = anyio.Event()
        self._result: T | None = None
        self._error: Exception | None = None
        self.on_end: Callable[[Exception | None], None] | None = None
        """Told once, with what it failed of."""

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    async def result_async(self, timeout: float | None = None) -> T:
        """The result. Raises TimeoutError after `timeout` seconds, the command's own LorryError if it failed."""
        with anyio.fail_after(timeout):
            await self._resolved.wait()
        if self._error is not None:
            raise self._error
        return self._result  # pyright: ignore[reportReturnType]

    async def cancel(self) -> None:
        """Drop the command if it has not taken effect: awaiting then raises CommandCancelledError.

        One that is being executed may still complete; a sample stops at its next token.
        """
        await self._cancel(self.id)

    def done(self) -> bool:
        return self._resolved.is_set()

    def resolve(self, payload: bytes) -> None:
        """Called by the connection."""
        if not self.done():
            try:
                self._result = self._convert(payload)
            except Exception as error:  # whatever is wrong with a result is for whoever awaits it
                self._error = error
            self._end()

    def reject(self, error: Exception) -> None:
        """Called by the connection."""
        if not self.done():
            self._error = error
            self._end()

    def _end(self) -> None:
        self._resolved.set()
        if self.on_end is not None:
            self.on_end(self._error)
