"""A training request as the model is to read it: the ids of its tokens, and its images, seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...wire.commands import ForwardBackwardInput
from ...wire.types import Datum
from ..images.eyes import Eyes
from ..images.layout import Images, count_images, see_images
from ..model.memory import told_as_ours


@dataclass(frozen=True, slots=True)
class ReadDatum:
    """A datum. `ids` are below 0 where an image's tokens are."""

    ids: list[int]
    images: Images | None


@dataclass(frozen=True, slots=True)
class Readable:
    """A request that has passed `check_forward_backward`, and its data."""

    request: ForwardBackwardInput
    rows: Sequence[ReadDatum]


def with_counts(request: ForwardBackwardInput, eyes: Eyes | None, max_context: int) -> ForwardBackwardInput:
    """It says of each image how many tokens it is. Raises InvalidRequestError as `count_images` does."""
    if not any(datum.model_input.has_images for datum in request.data):
        return request
    counted = [
        Datum(count_images(f"data[{i}].model_input", datum.model_input, eyes, max_context), datum.loss_fn_inputs)
        for i, datum in enumerate(request.data)
    ]
    return ForwardBackwardInput(counted, request.loss_fn, request.loss_fn_config)


def read_rows(request: ForwardBackwardInput, eyes: Eyes | None, pause: Callable[[], None]) -> list[ReadDatum]:
    """`pause` is called after each row with images. What was seen stays in memory as long as the rows do.

    Raises InvalidRequestError for a broken image, OutOfMemoryError for one that is too large to be seen.
    """
    rows: list[ReadDatum] = []
    for i, datum in enumerate(request.data):
        name = f"data[{i}].model_input"
        with told_as_ours(f"what is seen in the images of {name}", name):
            rows.append(ReadDatum(*see_images(name, datum.model_input, eyes, keep=True)))
        if datum.model_input.has_images:
            pause()
    return rows
