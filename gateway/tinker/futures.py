"""Results: waited for without polling, answered as the SDK reads them."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from tinker.types import (
    CreateCustomLossResponse,
    CreateModelResponse,
    FutureRetrieveRequest,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsResponse,
    UnloadModelResponse,
)
from tinker.types._pydantic_types.save_weights_external_response import SaveWeightsExternalResponseInternal
from tinker.types._pydantic_types.save_weights_for_sampler_response import SaveWeightsForSamplerResponseInternal
from tinker.types.future_completion import FutureCompletion, FutureFailed, FutureFinished
from tinker.types.futures_retrieve_request import FuturesRetrieveRequest
from tinker.types.futures_retrieve_response import FuturesRetrieveResponse
from tinker.types.try_again_response import TryAgainResponse

from ...wire import types as lorry
from ...wire.catalogue_messages import CompletedSince, Completions, FutureState
from ...wire.codec import decode
from ...wire.errors import AuthenticationError, ConnectionLostError, LorryError, NotFoundError
from ...wire.ids import LaneId
from ..bodies import body_of
from ..broker import Broker, BrokerOf, broker_of
from ..errors import failed
from ..request_ids import RequestId, ResultKind
from .results import pass_to_json, pass_to_protobuf, sample_to_json, sample_to_protobuf

router = APIRouter()

_PROTOBUF = "application/x-protobuf"
_SEQS_OF_A_CLIENT = 1_000_000_000
"""The n-th client of a sampling session counts its requests from n times this."""


class _Cancel(BaseModel):
    """The SDK sends this from a plain dict; it has no type of it."""

    request_id: str


_read_retrieval = body_of(FutureRetrieveRequest)


async def retrieve_future(request: Request) -> Response:
    """A plain route: a training loop waits for it at every step."""
    async with broker_of(request, waits=True) as broker:
        wanted = RequestId.parse((await _read_retrieval(request)).request_id)
        return await _retrieve(broker, request, wanted)


router.add_route("/retrieve_future", retrieve_future, ["POST"])


async def _retrieve(broker: Broker, request: Request, wanted: RequestId) -> Response:
    within_s = request.app.state.gateway.config.long_poll_s
    if wanted.kind == "custom_loss":
        return _json(CreateCustomLossResponse(loss_id=wanted.future))
    if wanted.kind in ("create", "unload"):
        return await _run_is_there(broker, wanted, within_s)
    try:
        payload = await broker.result(wanted.future, within_s)
    except TimeoutError:
        return await _try_again(broker, wanted)
    except (ConnectionLostError, AuthenticationError):  # the request's own failures, not the command's
        raise
    except LorryError as error:
        answer = failed(error)
    else:
        answer = _render(wanted.kind, payload, _PROTOBUF in request.headers.get("accept", ""))
    if not await request.is_disconnected():
        broker.was_read(wanted.future)
    return answer


async def _run_is_there(broker: Broker, wanted: RequestId, within_s: float) -> Response:
    """It is, once its model has been loaded; until then the SDK is told what it waits for."""
    run = LaneId(wanted.future)
    try:
        state = await broker.lane_state(run, within_s)
    except (ConnectionLostError, AuthenticationError):
        raise
    except LorryError as error:
        return failed(error)
    if state.state != "active":
        return _come_again(wanted, state)
    kind = CreateModelResponse if wanted.kind == "create" else UnloadModelResponse
    return _json(kind(model_id=run))


async def _try_again(broker: Broker, wanted: RequestId) -> Response:
    try:
        state = await broker.queue_state(wanted.future)
    except NotFoundError:
        state = FutureState("active", "it resolved in this very moment")
    return _come_again(wanted, state)


def _come_again(wanted: RequestId, state: FutureState) -> Response:
    answer = TryAgainResponse(request_id=str(wanted), queue_state=state.state)
    return JSONResponse(answer.model_dump(mode="json") | {"queue_state_reason": state.reason})


def _render(kind: ResultKind, payload: bytes, protobuf: bool) -> Response:
    match kind:
        case "pass":
            output = decode(payload, lorry.ForwardBackwardOutput)
            return _binary(pass_to_protobuf(output)) if protobuf else JSONResponse(pass_to_json(output))
        case "sample":
            sample = decode(payload, lorry.SampleResponse)
            return _binary(sample_to_protobuf(sample)) if protobuf else JSONResponse(sample_to_json(sample))
        case "step":
            return _json(OptimStepResponse(metrics=decode(payload, lorry.OptimStepResponse).metrics))
        case "save":
            return _json(SaveWeightsResponse(path=decode(payload, lorry.SaveWeightsResponse).path, type="save_weights"))
        case "load":
            return _json(LoadWeightsResponse(path=decode(payload, lorry.LoadWeightsResponse).path, type="load_weights"))
        case "sampler":
            saved = decode(payload, lorry.SaveWeightsForSamplerResponse)
            named = saved.sampling_session_id is None
            return _json(
                SaveWeightsForSamplerResponseInternal(
                    path=saved.path if named else None,
                    sampling_session_id=saved.sampling_session_id,
                    type="save_weights_for_sampler",
                )
            )
        case "external":
            path = decode(payload, lorry.SaveWeightsForSamplerResponse).path
            return _json(SaveWeightsExternalResponseInternal(path=path, type="save_weights_external"))
        case "create" | "unload" | "custom_loss":
            raise AssertionError("these have no result")


def _json(answer: BaseModel) -> Response:
    return JSONResponse(answer.model_dump(mode="json", exclude_none=True))


def _binary(data: bytes) -> Response:
    return Response(data, media_type=_PROTOBUF)


@router.post("/retrieve_futures")
async def retrieve_futures(
    broker: BrokerOf,
    request: Request,
    body: Annotated[FuturesRetrieveRequest, Depends(body_of(FuturesRetrieveRequest))],
) -> FuturesRetrieveResponse:
    """What one client of a sampling session has to fetch. Results stay until their time to live ends."""
    low = body.target.cloned_sampler_id * _SEQS_OF_A_CLIENT
    limit = request.app.state.gateway.config.long_poll_s
    wait = limit if body.timeout is None else min(max(body.timeout, 0.0), limit)
    lane = LaneId(body.target.sampling_session_id)
    found = await broker.ask(
        lambda number: Completions(number, lane, low, low + _SEQS_OF_A_CLIENT, body.prev_cursor, wait),
        CompletedSince,
        more_s=wait,
    )
    completions: list[FutureCompletion] = []
    for done in found.completed:
        name = str(RequestId("sample", done.future))
        if done.failed:
            completions.append(FutureFailed(request_id=name))
        else:
            completions.append(FutureFinished(request_id=name, response_payload_uncompressed_size=done.size_bytes))
    return FuturesRetrieveResponse(completions=completions, cursor=found.cursor)


@router.post("/cancel_future", status_code=204)
async def cancel_future(broker: BrokerOf, body: Annotated[_Cancel, Depends(body_of(_Cancel))]) -> Response:
    await broker.cancel(RequestId.parse(body.request_id).future)
    return Response(status_code=204)
