"""A training request as the model is to read it: the ids of its tokens, and its images, seen."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...wire.commands import ForwardBackwardInput, check_forward_backward
from ...wire.types import Datum
from ..images.layout import Counted, count_images
from ..images.looking import Looking, Read
from ..model.base_model import BaseModel
from ..model.memory import told_as_ours


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
        request = ForwardBackwardInput(data, request.loss_fn, request.loss_fn_config)
    check_forward_backward(request, base.vocab_size, base.max_context)
    return Readable(request, [_read(f"data[{i}].model_input", each, base) for i, each in enumerate(counted)])


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
