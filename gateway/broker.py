"""A handler's way to the broker: its tenant's connection, with a limit on how long an answer may take."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Annotated, Any, TypeAlias, TypeVar

import anyio
from fastapi import Depends, Request
from tinker.lib._jwt_auth import jwt_claims

from ..client.connection import Connection
from ..client.streams import SampleStream
from ..wire import tracing
from ..wire.catalogue_messages import FutureState, LaneState, LendCheckpoint, Query, QueueState
from ..wire.client_messages import CommandArguments, Refuse, Submit
from ..wire.commands import CommandKind
from ..wire.errors import (
    AuthenticationError,
    InvalidRequestError,
    LorryError,
    NotFoundError,
    PermissionDeniedError,
)
from ..wire.ids import FutureId, LaneId, TenantId, future_id
from .errors import LoadingError
from .peers import peer_of
from .request_ids import RequestId, ResultKind

T = TypeVar("T")

TIMEOUT_HEADER = "X-Lorry-Timeout-S"
"""How many seconds after it was accepted a command is to be over."""


_OF_AN_ACCOUNT = "a key, or a token, of the account that has the checkpoint; it is not told here"

Connect: TypeAlias = Callable[[str], AbstractAsyncContextManager[Connection]]
"""The connection of another key."""


class Broker:
    """`timeout_s` is what a request said of when its command is to be over."""

    def __init__(
        self,
        connection: Connection,
        answer_within_s: float,
        timeout_s: str | None = None,
        connect: Connect | None = None,
    ) -> None:
        self._connection, self._answer_within_s, self._timeout_s = connection, answer_within_s, timeout_s
        self._connect = connect

    @property
    def connection(self) -> Connection:
        """The tenant's: what is kept of it is kept as long as it lasts."""
        return self._connection

    async def ask(self, message: Callable[[int], Any], kind: type[T], more_s: float = 0.0) -> T:
        """`message` makes the request from its number. Raises the broker's LorryError, TimeoutError."""
        with anyio.fail_after(self._answer_within_s + more_s):
            return await self._connection.ask(message(self._connection.next_request()), kind)

    async def tell(self, message: Callable[[int], Any]) -> None:
        with anyio.fail_after(self._answer_within_s):
            await self._connection.tell(message(self._connection.next_request()))

    async def borrow(self, path: str, token: str) -> None:
        """Have a checkpoint lent, should it be of the account that the token, a key or a token of a key's, is of.

        Raises InvalidRequestError for a token that is of none; what it may not do is told as its own.
        """
        assert self._connect is not None, "made by broker_of"
        tenant = TenantId(await self.look("tenant", str))
        try:
            check_token(token)
            async with self._connect(token) as connection:
                lender = Broker(connection, self._answer_within_s)
                with suppress(NotFoundError):  # whether it can be read at all is told by whoever reads it
                    await lender.tell(lambda number: LendCheckpoint(number, path, tenant))
        except AuthenticationError:
            raise InvalidRequestError.of("weights_access_token", "none", _OF_AN_ACCOUNT) from None
        except PermissionDeniedError as error:
            raise InvalidRequestError(f"weights_access_token: {error}", field="weights_access_token") from None

    async def look(self, what: Any, kind: type[T], subject: str | None = None) -> T:
        return await self.ask(lambda number: Query(number, what, subject), kind)

    async def submit(
        self,
        lane: str,
        seq: int,
        kind: CommandKind,
        result: ResultKind,
        payload: bytes = b"",
        tokens: int = 0,
        rows: int = 0,
        arguments: CommandArguments | None = None,
        prefix: list[int] | None = None,
    ) -> RequestId:
        """Journalled when this returns. Sent again, it is the same future.

        Raises InvalidRequestError where the timeout is no number.
        """
        timeout_s = _seconds(self._timeout_s)
        future = future_id(LaneId(lane), seq)
        number = self._connection.next_request()
        told = arguments or CommandArguments()
        header = Submit(number, LaneId(lane), seq, kind, tokens, rows, told, prefix or [], timeout_s, tracing.current())
        acknowledgement = self._connection.submit(header, payload, self._connection.expect(future))
        with anyio.fail_after(self._answer_within_s):
            await acknowledgement.wait()
        return RequestId(result, future)

    @asynccontextmanager
    async def stream(
        self, lane: str, seq: int, samples: int, payload: bytes, tokens: int, prefix: list[int]
    ) -> AsyncGenerator[SampleStream]:
        """A sample whose tokens are read as they are made; cancelled at the block's end unless it is over. Journalled
        when the block begins."""
        future = future_id(LaneId(lane), seq)
        stream = SampleStream(future, samples, self._connection.cancel)
        told, number = CommandArguments(stream=True), self._connection.next_request()
        header = Submit(number, LaneId(lane), seq, "sample", tokens, samples, told, prefix, _seconds(self._timeout_s))
        async with stream:
            acknowledgement = self._connection.submit(header, payload, stream)
            with anyio.fail_after(self._answer_within_s):
                await acknowledgement.wait()
            yield stream

    async def refuse(
        self, lane: str, seq: int, kind: CommandKind, result: ResultKind, mistake: LorryError
    ) -> RequestId:
        """End a command's place in its run's order: its future fails with `mistake`. Journalled when this returns."""
        future = future_id(LaneId(lane), seq)
        await self.tell(lambda number: Refuse(number, LaneId(lane), seq, kind, mistake.info))
        return RequestId(result, future)

    async def result(self, future: FutureId, within_s: float) -> bytes:
        """The encoded result. Raises TimeoutError while there is none, the command's LorryError where it failed."""
        return await self._connection.watch(future).result_async(within_s)

    def was_read(self, future: FutureId) -> None:
        """Its result, or how it failed, goes to who asked for it."""
        self._connection.was_read(future)

    async def lane_state(self, lane: LaneId, within_s: float) -> FutureState:
        """Whether a run or a sampler can be used; waits while its model is being loaded."""
        return await self.ask(lambda number: LaneState(number, lane, within_s), FutureState, more_s=within_s)

    async def loaded(self, lane: str, within_s: float) -> None:
        """Raises LoadingError where the model of a run or a sampler is still being loaded after a while."""
        state = await self.lane_state(LaneId(lane), within_s)
        if state.state != "active":
            raise LoadingError(state.reason)

    async def queue_state(self, future: FutureId) -> FutureState:
        return await self.ask(lambda number: QueueState(number, future), FutureState)

    async def cancel(self, future: FutureId) -> None:
        with anyio.fail_after(self._answer_within_s):
            await self._connection.cancel(future)


def _seconds(said: str | None) -> float | None:
    try:
        return None if said is None else float(said)
    except ValueError:
        raise InvalidRequestError.of(TIMEOUT_HEADER, said, "seconds, as a number") from None


def api_key(request: Request) -> str:
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    key = request.headers.get("x-api-key") or bearer
    if not key:
        raise AuthenticationError("the request has no X-API-Key header", field="api_key")
    check_token(key)
    return key


def check_token(key: str) -> None:
    """Raises AuthenticationError for a token that is over."""
    if key.startswith("eyJ"):
        _check_expiry(key)


def _check_expiry(token: str) -> None:
    """The broker checks a token when its connection is opened, and that may be a while ago."""
    try:
        fresh = float(jwt_claims(token)["exp"]) > time.time()
    except (ValueError, KeyError, TypeError):
        fresh = False
    if not fresh:
        raise AuthenticationError("the token has expired, or is none", field="api_key")


@asynccontextmanager
async def broker_of(request: Request, *, waits: bool = False) -> AsyncGenerator[Broker]:
    """For the few plain routes that a training loop calls at every step; all others take a BrokerOf. One that `waits`
    is for what was sent before."""
    gateway = request.app.state.gateway
    peer = peer_of(request.client.host) if request.client else ""
    async with gateway.connections.use(api_key(request), peer, waits=waits) as connection:
        timeout_s, answer_within_s = request.headers.get(TIMEOUT_HEADER), gateway.config.answer_within_s
        yield Broker(connection, answer_within_s, timeout_s, partial(gateway.connections.use, peer=peer))


async def _broker(request: Request) -> AsyncGenerator[Broker]:
    async with broker_of(request) as broker:
        yield broker


BrokerOf = Annotated[Broker, Depends(_broker)]
