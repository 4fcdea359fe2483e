"""forward, forward_backward and optim_step. The SDK's seq ids are Lorry's own: both count a run's commands.

These are plain routes, without the dependencies and response models of the others: a training loop waits for each.
"""

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import Response
from tinker.types import OptimStepRequest
from tinker.types.optimizer import AdamParams as SdkAdamParams

from ...wire.codec import encode
from ...wire.commands import OptimStepInput, check_adam_params
from ...wire.types import AdamParams
from ..broker import Broker
from ..errors import NotSupportedError
from .ordered import Wanted, json_command, place_in_protobuf, seq_of, submit
from .protobuf import read_pass

router = APIRouter()

_THREAD_FROM_BYTES = 64 * 1024
"""Decoding a larger body in place would hold up everybody else's requests."""


async def forward_backward(request: Request) -> Response:
    return await submit(request, "forward_backward", "pass", place_in_protobuf, _read)


async def _read(broker: Broker, body: bytes) -> Wanted:
    return read_pass(body) if len(body) < _THREAD_FROM_BYTES else await to_thread.run_sync(read_pass, body)


async def _step(broker: Broker, body: OptimStepRequest) -> Wanted:
    return Wanted(body.model_id, seq_of(body.seq_id), encode(OptimStepInput(_adam_params(body))))


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
router.add_route("/optim_step", json_command(OptimStepRequest, "optim_step", "step", _step), ["POST"])
