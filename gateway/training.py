"""forward, forward_backward and optim_step. The SDK's seq ids are Lorry's own: both count a run's commands."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from tinker.types import OptimStepRequest, UntypedAPIFuture
from tinker.types.optimizer import AdamParams as SdkAdamParams

from ..wire.codec import encode
from ..wire.commands import OptimStepInput, check_adam_params
from ..wire.errors import InvalidRequestError
from ..wire.types import AdamParams
from .bodies import BodyBudget, body_of
from .broker import Broker, BrokerOf
from .errors import NotSupportedError
from .protobuf import Pass, read_pass

router = APIRouter()

_THREAD_FROM_BYTES = 64 * 1024
"""Decoding a larger body in place would hold up everybody else's requests."""


def seq_of(seq_id: int | None) -> int:
    if seq_id is None:
        raise InvalidRequestError.of("seq_id", seq_id, "the number of this request among the model's")
    return seq_id


@router.post("/forward")
@router.post("/forward_backward")
async def forward_backward(broker: BrokerOf, request: Request) -> UntypedAPIFuture:
    bodies: BodyBudget = request.app.state.gateway.bodies
    async with bodies.read(request) as body:
        wanted = await _read(body)
        return await _submit(broker, wanted)


async def _read(body: bytes) -> Pass:
    return read_pass(body) if len(body) < _THREAD_FROM_BYTES else await to_thread.run_sync(read_pass, body)


async def _submit(broker: Broker, wanted: Pass) -> UntypedAPIFuture:
    made = await broker.submit(wanted.run, wanted.seq, wanted.kind, "pass", wanted.payload, wanted.tokens, wanted.rows)
    return UntypedAPIFuture(request_id=str(made), model_id=wanted.run)


@router.post("/optim_step")
async def optim_step(
    broker: BrokerOf, body: Annotated[OptimStepRequest, Depends(body_of(OptimStepRequest))]
) -> UntypedAPIFuture:
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
    payload = encode(OptimStepInput(params))
    made = await broker.submit(body.model_id, seq_of(body.seq_id), "optim_step", "step", payload)
    return UntypedAPIFuture(request_id=str(made), model_id=body.model_id)
