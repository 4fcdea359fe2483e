"""forward, forward_backward and optim_step. The SDK's seq ids are Lorry's own: both count a run's commands.

These are plain routes, without the dependencies and response models of the others: a training loop waits for each.
"""

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import Response
from tinker.types import OptimStepRequest, UntypedAPIFuture
from tinker.types.optimizer import AdamParams as SdkAdamParams

from ...wire.codec import encode
from ...wire.commands import OptimStepInput, check_adam_params
from ...wire.errors import InvalidRequestError
from ...wire.types import AdamParams
from ..bodies import BodyBudget, body_of
from ..broker import broker_of
from ..errors import NotSupportedError
from ..request_ids import RequestId
from .protobuf import Pass, read_pass

router = APIRouter()

_THREAD_FROM_BYTES = 64 * 1024
"""Decoding a larger body in place would hold up everybody else's requests."""


def seq_of(seq_id: int | None) -> int:
    if seq_id is None:
        raise InvalidRequestError.of("seq_id", seq_id, "the number of this request among the model's")
    return seq_id


async def forward_backward(request: Request) -> Response:
    bodies: BodyBudget = request.app.state.gateway.bodies
    async with broker_of(request) as broker, bodies.read(request) as body:
        wanted = await _read(body)
        made = await broker.submit(
            wanted.run, wanted.seq, wanted.kind, "pass", wanted.payload, wanted.tokens, wanted.rows
        )
    return _accepted(made, wanted.run)


async def _read(body: bytes) -> Pass:
    return read_pass(body) if len(body) < _THREAD_FROM_BYTES else await to_thread.run_sync(read_pass, body)


def _accepted(made: RequestId, run: str) -> Response:
    future = UntypedAPIFuture(request_id=str(made), model_id=run)
    return Response(future.model_dump_json(), media_type="application/json")


_read_step = body_of(OptimStepRequest)


async def optim_step(request: Request) -> Response:
    async with broker_of(request) as broker:
        body = await _read_step(request)
        payload = encode(OptimStepInput(_adam_params(body)))
        made = await broker.submit(body.model_id, seq_of(body.seq_id), "optim_step", "step", payload)
    return _accepted(made, body.model_id)


def _adam_params(body: OptimStepRequest) -> AdamParams:
    theirs = body.optim_params
    if not isinstance(theirs, SdkAdamParams):
        raise NotSupportedError(f"the optimizer is {theirs.type!r}, expected Adam", field="optim_params")
    params = AdamParams(
        learning_rate=theirs.learning_rate,
        beta1=theirs.beta1,
        beta2=theirs.beta2,
        eps=theirs.eps,
        weight_decay=theirs.weight_decay,
        grad_clip_norm=theirs.grad_clip_norm,
    )
    check_adam_params(params)
    return params


for path in ("/forward", "/forward_backward"):
    router.add_route(path, forward_backward, ["POST"])
router.add_route("/optim_step", optim_step, ["POST"])
