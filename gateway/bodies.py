"""Request bodies: read in pieces, counted, decompressed and validated, so that none costs more memory than allowed."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import pydantic
import zstandard
from fastapi import Request

from ..wire.errors import MessageTooLargeError
from .errors import MalformedBodyError, OverloadedError

M = TypeVar("M", bound=pydantic.BaseModel)

_WINDOW_BYTES = 8 * 2**20
"""What a decoder must hold of what it has unpacked; the SDK's level needs no more."""
_STEP_BYTES = 256
"""A zstd block takes 4 bytes at least and holds 128 KiB at most: a step unpacks to 8 MiB at the very worst."""


_BEGINNING_BYTES = 128 * 1024
"""All of a body that is no data: what is larger is refused for its size."""


class BodyBudget:
    """How many bytes of bodies may be in memory at a time: `one` of a single request, `all` of all of them."""

    def __init__(self, one: int, all: int) -> None:
        self._one, self._free = one, all

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncGenerator[bytes]:
        """The decompressed body, charged to the budget until the block ends. `request.state.beginning` holds as much
        of it as says what it was, also where the rest could not be read.

        Raises MessageTooLargeError, OverloadedError, MalformedBodyError.
        """
        body = bytearray()
        try:
            async for piece in _unpacked(request):
                body += piece
                self._free -= len(piece)
                if len(body) > self._one:
                    raise MessageTooLargeError(f"the body has more than {self._one:,} bytes, which is the limit")
                if self._free < 0:
                    raise OverloadedError("too many bytes of requests are being read at the moment")
            yield bytes(body)
        finally:
            request.state.beginning = bytes(body[:_BEGINNING_BYTES])
            self._free += len(body)


async def _unpacked(request: Request) -> AsyncIterator[bytes]:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "identity":
        async for sent in request.stream():
            yield sent
        return
    if encoding != "zstd":
        raise MalformedBodyError(f"content-encoding is {encoding!r}, expected zstd or none")
    decoder = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()
    try:
        async for sent in request.stream():
            for start in range(0, len(sent), _STEP_BYTES):
                yield decoder.decompress(sent[start : start + _STEP_BYTES])
    except (zstandard.ZstdError, EOFError) as error:
        raise MalformedBodyError(f"the body is not zstd ({error})") from None
    if not decoder.eof:
        raise MalformedBodyError("the body ends in the middle of its zstd frame")


def body_of(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    """A dependency that reads a JSON body as `model`, one of the SDK's own types."""

    async def read(request: Request) -> M:
        budget: BodyBudget = request.app.state.gateway.bodies
        async with budget.read(request) as body:
            return parse(model, body)

    return read


def parse(model: type[M], body: bytes) -> M:
    """Raises MalformedBodyError naming the field."""
    try:
        return model.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise MalformedBodyError(f"{where}: {first['msg']}") from None
