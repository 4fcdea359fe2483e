"""A training request as the model is to read it: the ids of its tokens, and its images, seen."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...wire.commands import ForwardBackwardInput
from ...wire.model_input import ModelInput
from ...wire.types import Datum
from ..images.eyes import Eyes
from ..images.layout import count_images
from ..images.looking import Looking, Read
from ..model.base_model import BaseModel
from ..model.memory import told_as_ours


@dataclass(frozen=True, slots=True)
class Readable:
    """A request that has passed `check_forward_backward`, and its data."""

    request: ForwardBackwardInput
    rows: Sequence[Read]


def with_counts(request: ForwardBackwardInput, eyes: Eyes | None, max_context: int) -> ForwardBackwardInput:
    """It says of each image how many tokens it is. Raises InvalidRequestError as `count_images` does."""
    if not any(datum.model_input.has_images for datum in request.data):
        return request
    counted = [
        Datum(count_images(f"data[{i}].model_input", datum.model_input, eyes, max_context), datum.loss_fn_inputs)
        for i, datum in enumerate(request.data)
    ]
    return ForwardBackwardInput(counted, request.loss_fn, request.loss_fn_config)


def read_rows(request: ForwardBackwardInput, base: BaseModel) -> list[Read]:
    """Others may decode meanwhile. What was seen stays in memory as long as the rows do.

    Raises InvalidRequestError for a broken image, OutOfMemoryError for one that is too large to be seen.
    """
    return [_read(f"data[{i}].model_input", datum.model_input, base) for i, datum in enumerate(request.data)]


def _read(name: str, tokens: ModelInput, base: BaseModel) -> Read:
    looking = Looking(name, tokens, base.eyes, keep=True)
    while True:
        with told_as_ours(f"what is seen in the images of {name}", name):
            done = looking.go_on(after_one=False)
        if done is not None:
            return done
        base.in_flight.pause()
        if not base.in_flight.beside_others:
            looking.wait()
