"""A sample whose tokens are read as they are made."""

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType

import anyio
import msgspec

from ..wire.codec import decode
from ..wire.errors import StreamDivergedError
from ..wire.ids import FutureId
from ..wire.streaming import Assembly, Piece
from ..wire.types import SampleResponse, StopReason, TopkLogprobs
from .futures import Cancel, Future

_CANCEL_WITHIN_S = 5.0


class StreamedToken(msgspec.Struct, frozen=True):
    """One token of sample number `sample`. `stop_reason` is that of its last one, and None before. `topk_logprobs` are
    the likeliest tokens in its place, as far as they were asked for."""

    sample: int
    token: int
    logprob: float
    topk_logprobs: TopkLogprobs | None = None
    stop_reason: StopReason | None = None


class SampleStream(Future[SampleResponse]):
    """`async for token in stream` reads tokens as they are made, of several samples mixed; awaiting it, or
    `result_async`, gives the whole response. As `async with`, it is cancelled at the block's end unless it is over.

    A connection that is lost, a reader that is slow or an actor that dies costs time and no token. Iterating raises
    what the command failed with; and StreamDivergedError where the server began anew and other tokens came of it than
    were streamed, which is for the reader to know: the result is whole all the same.
    """

    def __init__(self, id: FutureId, samples: int, cancel: Cancel) -> None:
        super().__init__(id, lambda payload: decode(payload, SampleResponse), cancel)
        self._assembly = Assembly(samples)
        self._unread: deque[Piece] = deque()
        self._diverged: StreamDivergedError | None = None
        self._news = anyio.Event()

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The same, as many tokens at a time as there are. For one reader."""
        while True:
            while self._unread:
                yield self._unread.popleft()
            if self._diverged is not None:
                raise self._diverged
            if self.done():
                await self.result_async()
                return
            self._news = anyio.Event()
            await self._news.wait()

    async def __aiter__(self) -> AsyncIterator[StreamedToken]:
        async for piece in self.pieces():
            last = len(piece.tokens) - 1
            for i, (token, logprob) in enumerate(zip(piece.tokens, piece.logprobs, strict=True)):
                top = None if piece.topk_logprobs is None else piece.topk_logprobs[i]
                yield StreamedToken(piece.sample, token, logprob, top, piece.stop_reason if i == last else None)

    async def __aenter__(self) -> "SampleStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.done():
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CANCEL_WITHIN_S):
                await self.cancel()

    def made(self, payload: bytes) -> None:
        """Called by the connection."""
        self._add(decode(payload, list[Piece]))

    def resolve(self, payload: bytes) -> None:
        super().resolve(payload)
        if self._result is not None and self._diverged is None:
            try:
                self._unread += self._assembly.rest(self._result)
            except StreamDivergedError as error:
                self._diverged = error
        self._news.set()

    def reject(self, error: Exception) -> None:
        super().reject(error)
        self._news.set()

    def _add(self, pieces: list[Piece]) -> None:
        if self.done() or self._diverged is not None:
            return
        try:
            self._unread += self._assembly.add(pieces)
        except StreamDivergedError as error:
            self._diverged = error
        self._news.set()
