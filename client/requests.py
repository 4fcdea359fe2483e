"""What was asked of the broker and is not answered yet."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import anyio

from ..wire.client_messages import Submit
from ..wire.errors import LorryError
from ..wire.ids import LaneId


@dataclass(slots=True)
class Request:
    """Sent, and not answered yet; sent again to a broker that does not know this session."""

    frames: list[bytes]
    command: Submit | None = None
    answered: anyio.Event = field(default_factory=anyio.Event)
    payload: bytes = b""
    error: LorryError | None = None
    on_error: Callable[[LorryError], None] | None = None

    @property
    def lane(self) -> LaneId | None:
        return self.command.lane if self.command else None


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """Await it to know that what was asked for is durable. Raises the server's LorryError where it was refused."""

    request: Request

    def __await__(self) -> Generator[Any, None, None]:
        return self.wait().__await__()

    async def wait(self) -> None:
        await self.request.answered.wait()
        if self.request.error is not None:
            raise self.request.error
