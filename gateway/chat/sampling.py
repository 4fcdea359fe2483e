"""A request for text at the broker: accepted, waited for, and cancelled where nobody waits any longer."""

import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import anyio
import structlog

from ...client.streams import SampleStream
from ...wire.catalogue_messages import SamplerInfo
from ...wire.codec import decode, encode
from ...wire.commands import ComputeLogprobsInput, SampleInput, check_sample, planned_length, planned_tokens
from ...wire.errors import LorryError, NotFoundError
from ...wire.ids import FutureId
from ...wire.prefixes import prefix_marks
from ...wire.streaming import Piece, whole
from ...wire.types import SampleResponse
from ..broker import Broker
from .models import Desk, Meant

log = structlog.get_logger("lorry.gateway")

_WAIT_S = 30.0
"""For a result, until the broker is asked again."""
_CANCEL_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which sampler a request goes to; made anew where the broker has forgotten it."""

    desk: Desk
    broker: Broker
    meant: Meant
    within_s: float

    async def info(self) -> SamplerInfo:
        return await self.desk.sampler(self.broker, self.meant, self.within_s)

    def forget(self) -> None:
        self.desk.forget(self.broker, self.meant)


class Sample(Protocol):
    """One that was accepted."""

    @property
    def future(self) -> FutureId: ...

    def pieces(self) -> AsyncIterator[Piece]:
        """Raises the command's LorryError, and StreamDivergedError."""
        ...

    async def response(self) -> SampleResponse:
        """Waits as long as it takes. Raises the command's LorryError."""
        ...


@asynccontextmanager
async def accepted(
    chosen: Chosen, wanted: SampleInput | ComputeLogprobsInput, *, streams: bool = False
) -> AsyncGenerator[Sample]:
    """Journalled when this yields; cancelled where the block ends before its result is there. One that `streams` tells
    its pieces as they are made.

    Raises InvalidRequestError, TooManyWaitingError, LimitReachedError.
    """
    if isinstance(wanted, SampleInput):
        check_sample(wanted)
    async with AsyncExitStack() as stack:
        try:
            sample = await stack.enter_async_context(await _sent(chosen, wanted, streams))
        except NotFoundError:
            chosen.forget()
            sample = await stack.enter_async_context(await _sent(chosen, wanted, streams))
        yield sample
        chosen.broker.was_read(sample.future)


async def _sent(
    chosen: Chosen, wanted: SampleInput | ComputeLogprobsInput, streams: bool
) -> AbstractAsyncContextManager[Sample]:
    sampler = (await chosen.info()).sampler
    if streams and isinstance(wanted, SampleInput):
        return _streamed(chosen.broker, sampler, wanted)
    return _whole(chosen.broker, sampler, wanted)


def _number() -> int:
    """Samples have no order among themselves: one is drawn that no other has."""
    return secrets.randbits(62)


class _Streamed:
    def __init__(self, stream: SampleStream) -> None:
        self._stream, self.future = stream, stream.id

    def pieces(self) -> AsyncIterator[Piece]:
        return self._stream.pieces()

    async def response(self) -> SampleResponse:
        return await self._stream


@asynccontextmanager
async def _streamed(broker: Broker, sampler: str, wanted: SampleInput) -> AsyncGenerator[Sample]:
    payload, tokens, marks = encode(wanted), planned_tokens(wanted), prefix_marks(wanted.prompt)
    async with broker.stream(sampler, _number(), wanted.num_samples, payload, tokens, marks) as stream:
        yield _Streamed(stream)


class _Whole:
    def __init__(self, broker: Broker, future: FutureId) -> None:
        self._broker, self.future = broker, future
        self.is_over = False

    async def response(self) -> SampleResponse:
        while True:
            try:
                payload = await self._broker.result(self.future, _WAIT_S)
            except TimeoutError:
                continue
            except LorryError:
                self.is_over = True
                raise
            self.is_over = True
            return decode(payload, SampleResponse)

    async def pieces(self) -> AsyncIterator[Piece]:
        for piece in whole(await self.response()):
            yield piece


@asynccontextmanager
async def _whole(broker: Broker, sampler: str, wanted: SampleInput | ComputeLogprobsInput) -> AsyncGenerator[Sample]:
    scores = isinstance(wanted, ComputeLogprobsInput)
    made = await broker.submit(
        sampler,
        _number(),
        "compute_logprobs" if scores else "sample",
        "sample",
        encode(wanted),
        planned_length(wanted.prompt) if scores else planned_tokens(wanted),
        1 if scores else wanted.num_samples,
        prefix=prefix_marks(wanted.prompt),
    )
    sample = _Whole(broker, made.future)
    try:
        yield sample
    finally:
        if not sample.is_over:
            await _cancel(broker, made.future)


async def _cancel(broker: Broker, future: FutureId) -> None:
    with anyio.CancelScope(shield=True), anyio.move_on_after(_CANCEL_WITHIN_S):
        try:
            await broker.cancel(future)
        except (LorryError, TimeoutError) as error:
            log.warning("not cancelled", future=future, error=str(error))
