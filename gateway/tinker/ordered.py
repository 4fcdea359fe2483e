"""Commands with a place in a run's order. Whatever is wrong with one, its place ends: the run must not wait for it.

So a mistake in one is answered as an accepted request is, and its future fails. (The SDK sends the parts of a large
call side by side, and would never send the first one had another been refused at once.) Only what is to come again, and
what has no place, is answered with an error.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import pydantic
import structlog
from fastapi import Request
from fastapi.responses import Response
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as public_pb
from tinker.types import UntypedAPIFuture

from ...wire.client_messages import CommandArguments
from ...wire.commands import CommandKind
from ...wire.errors import InternalError, InvalidRequestError, LorryError, MessageTooLargeError, NotFoundError
from ..bodies import BodyBudget, parse
from ..broker import Broker, broker_of
from ..errors import MalformedBodyError, NotSupportedError
from ..request_ids import RequestId, ResultKind

M = TypeVar("M", bound=pydantic.BaseModel)

log = structlog.get_logger("lorry.gateway")

_MISTAKES = (InternalError, InvalidRequestError, MalformedBodyError, MessageTooLargeError, NotSupportedError)
_PLACE_ENDS_WITHIN_BYTES = 400
_MODEL_ID = re.compile(rb'"model_id"\s*:\s*"([^"\\]{1,300})"')
_SEQ_ID = re.compile(rb'"seq_id"\s*:\s*(\d{1,18})\b')


class Place(msgspec.Struct, frozen=True):
    """What a request calls its run and its seq."""

    model_id: str
    seq_id: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A command as the broker takes it."""

    run: str
    seq: int
    payload: bytes = b""
    tokens: int = 0
    rows: int = 0
    arguments: CommandArguments | None = None
    kind: CommandKind | None = None


def seq_of(seq_id: int | None) -> int:
    if seq_id is None:
        raise InvalidRequestError.of("seq_id", seq_id, "the number of this request among the model's")
    return seq_id


def place_in_json(beginning: bytes) -> Place | None:
    """Also where the rest is missing or makes no sense."""
    try:
        return msgspec.json.decode(beginning, type=Place)
    except (msgspec.ValidationError, msgspec.DecodeError):
        model, seq = _MODEL_ID.search(beginning), _SEQ_ID.search(beginning)
        return Place(model[1].decode(errors="replace"), int(seq[1])) if model and seq else None


def place_in_protobuf(beginning: bytes) -> Place | None:
    """Run and seq are the first fields, and the bytes up to the end of any field are a message of their own."""
    for end in range(2, min(len(beginning), _PLACE_ENDS_WITHIN_BYTES) + 1):
        message = public_pb.ForwardBackwardRequest()
        try:
            message.ParseFromString(beginning[:end])
        except DecodeError:
            continue
        if message.model_id and message.seq_id:
            return Place(message.model_id, message.seq_id)
    return None


async def submit(
    request: Request,
    kind: CommandKind,
    result: ResultKind,
    find_place: Callable[[bytes], Place | None],
    understand: Callable[[Broker, bytes], Awaitable[Wanted]],
) -> Response:
    """Passes the command in the body on, or its refusal. Raises what is no mistake in it, or leaves no place to end."""
    bodies: BodyBudget = request.app.state.gateway.bodies
    async with broker_of(request) as broker:
        try:
            async with bodies.read(request) as body:
                wanted = await _understood(kind, understand, broker, body)
                made = await broker.submit(
                    wanted.run,
                    wanted.seq,
                    wanted.kind or kind,
                    result,
                    wanted.payload,
                    wanted.tokens,
                    wanted.rows,
                    wanted.arguments,
                )
            return _accepted(made)
        except _MISTAKES as mistake:
            return _accepted(await _refuse(broker, request, kind, result, find_place, mistake))


async def _understood(
    kind: CommandKind, understand: Callable[[Broker, bytes], Awaitable[Wanted]], broker: Broker, body: bytes
) -> Wanted:
    """A bug in reading it is a mistake of ours, and costs the command that it is in. A connection that was lost in
    mid-body, or an answer that is late, is neither: the same request comes again."""
    try:
        return await understand(broker, body)
    except (LorryError, TimeoutError):
        raise
    except Exception as bug:
        log.exception("bug", command=kind)
        raise InternalError(f"{kind} raised {type(bug).__name__} in the gateway") from bug


async def _refuse(
    broker: Broker,
    request: Request,
    kind: CommandKind,
    result: ResultKind,
    find_place: Callable[[bytes], Place | None],
    mistake: LorryError,
) -> RequestId:
    place = find_place(getattr(request.state, "beginning", b""))
    if place is None:
        raise mistake
    try:
        return await broker.refuse(place.model_id, place.seq_id, kind, result, mistake)
    except (NotFoundError, InvalidRequestError):  # there is no such place
        raise mistake from None


def json_command(
    model: type[M], kind: CommandKind, result: ResultKind, understand: Callable[[Broker, M], Awaitable[Wanted]]
) -> Callable[[Request], Awaitable[Response]]:
    """A plain route for a command whose body is JSON, one of the SDK's own types."""

    async def read(broker: Broker, body: bytes) -> Wanted:
        return await understand(broker, parse(model, body))

    async def handle(request: Request) -> Response:
        return await submit(request, kind, result, place_in_json, read)

    return handle


def _accepted(made: RequestId) -> Response:
    future = UntypedAPIFuture(request_id=str(made), model_id=made.lane)
    return Response(future.model_dump_json(), media_type="application/json")
