"""A training request as the model is to read it: the ids of its tokens, and its images, seen."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...wire.commands import ForwardBackwardInput, check_forward_backward
from ...wire.custom_loss import CustomLoss
from ...wire.errors import InvalidRequestError
from ...wire.types import Datum
from ..images.layout import Counted, count_images
from ..images.looking import Looking, Read
from ..model.base_model import BaseModel
from ..model.memory import told_as_ours
from .custom_losses import check_shapes


@dataclass(frozen=True, slots=True)
class Readable:
    """A request that has passed `check_forward_backward`, and its data."""

    request: ForwardBackwardInput
    rows: Sequence[Read]


def read_request(request: ForwardBackwardInput, base: BaseModel) -> Readable:
    """Others may decode while images are looked at.

    Raises InvalidRequestError, and OutOfMemoryError for an image that is too large to be seen.
    """
    counted = [
        count_images(f"data[{i}].model_input", datum.model_input, base.eyes, base.max_context)
        for i, datum in enumerate(request.data)
    ]
    if any(each.pictures for each in counted):
        data = [Datum(c.tokens, datum.loss_fn_inputs) for c, datum in zip(counted, request.data, strict=True)]
        request = ForwardBackwardInput(data, request.loss_fn, request.loss_fn_config, request.custom)
    check_forward_backward(request, base.vocab_size, base.max_context)
    if request.custom is not None:
        _check_custom(request.custom, request.data)
    return Readable(request, [_read(f"data[{i}].model_input", each, base) for i, each in enumerate(counted)])


def _check_custom(loss: CustomLoss, data: Sequence[Datum]) -> None:
    """Once for each shapes that there are. Raises InvalidRequestError."""
    seen: set[object] = set()
    for i, datum in enumerate(data):
        tensors = [datum.loss_fn_inputs[name] for name in ("target_tokens", *loss.names)]
        for given, tensor in zip(loss.inputs, tensors, strict=True):
            if len(tensor.shape) != given.rank:
                wanted = f"a shape of {given.rank} dimensions, as {loss.name} declares"
                raise InvalidRequestError.of(f"data[{i}].loss_fn_inputs[{given.name!r}].shape", tensor.shape, wanted)
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        dtypes = (torch.float32, *(getattr(torch, tensor.dtype) for tensor in tensors[1:]))
        if (shapes, dtypes) not in seen:
            check_shapes(f"data[{i}]", loss, shapes, dtypes)
            seen.add((shapes, dtypes))


def _read(name: str, counted: Counted, base: BaseModel) -> Read:
    looking = Looking(counted, base.eyes, on_host=True)
    try:
        while True:
            with told_as_ours(f"what is seen in the images of {name}", name):
                done = looking.go_on()
            if done is not None:
                return done
            if (pixels := looking.awaited) is not None:
                base.in_flight.wait_for(pixels)
            base.in_flight.pause()
    finally:
        looking.close()
