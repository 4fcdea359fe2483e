"""What of a model sees: its image processor and its frozen tower. Results are kept, as many as fit, by image."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...wire.errors import InvalidRequestError
from ...wire.model_input import ImageChunk
from .pictures import Digest, Picture, open_picture, pixels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAN_SEE = frozenset(("qwen3_vl", "qwen3_vl_moe"))
"""Of transformers' model types, those whose images were compared with the model's own. Of others the text is served."""

MAX_PIXELS = 2**25
CACHE_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Sight:
    """One image as the decoder takes it: in place of its tokens' embeddings, and added after its first layers."""

    embeddings: Tensor  # [tokens, hidden]
    layers: tuple[Tensor, ...]  # [tokens, hidden] each
    height: int  # in tokens
    width: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.embeddings, *self.layers))


class Eyes:
    """Images of more than `max_pixels` are refused. `cache_bytes` of what was seen are kept, the latest.

    `seen` counts the images that went through the tower.
    """

    def __init__(
        self, model: "PreTrainedModel", processor: Any, max_pixels: int = MAX_PIXELS, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.seen = 0
        self._model, self._processor = model, processor
        self._max_pixels, self._cache_bytes = max_pixels, cache_bytes
        self._sights: OrderedDict[Digest, Sight] = OrderedDict()  # least recently used first
        self._side: int = processor.merge_size  # of a token, in patches

    def open(self, name: str, chunk: ImageChunk) -> tuple[Picture, int]:
        """The picture, and how many tokens it is. Raises InvalidRequestError, also where the caller expected others."""
        picture = open_picture(name, chunk, self._max_pixels)
        try:
            patches: int = self._processor.get_number_of_image_patches(picture.height, picture.width, {})
        except ValueError as error:
            problem = f"{name} has {picture.width} x {picture.height} pixels, which the model does not take ({error})"
            raise InvalidRequestError(problem, field=name) from error
        tokens = patches // self._side**2
        if chunk.expected_tokens not in (None, tokens):
            wanted = f"{tokens}: the image has {picture.width} x {picture.height} pixels"
            raise InvalidRequestError.of(f"{name}.expected_tokens", chunk.expected_tokens, wanted)
        return picture, tokens

    def see(self, picture: Picture) -> Sight:
        """Decodes the picture and runs the tower, unless it is known. Raises InvalidRequestError for a broken file."""
        known = self._sights.pop(picture.digest, None)
        sight = known if known is not None else self._look(picture)
        self._sights[picture.digest] = sight
        while len(self._sights) > 1 and sum(each.nbytes for each in self._sights.values()) > self._cache_bytes:
            self._sights.popitem(last=False)
        return sight

    def _look(self, picture: Picture) -> Sight:
        # Alone, so that it sees the same whatever comes with it; and for training as well, whoever asked first.
        with torch.inference_mode(False), torch.no_grad():
            inputs = self._processor(images=[pixels_of(picture)], return_tensors="pt")
            found: Any = self._model.model.get_image_features(  # pyright: ignore[reportCallIssue]
                inputs["pixel_values"].to(self._model.device, self._model.dtype),
                inputs["image_grid_thw"].to(self._model.device),
                return_dict=True,
            )
            self.seen += 1
            _, height, width = (inputs["image_grid_thw"][0] // self._side).tolist()
            layers = tuple(_one(layer) for layer in found.deepstack_features)
            return Sight(_one(found.pooler_output), layers, height, width)


def eyes_of(
    model: "PreTrainedModel", path: str | Path, max_pixels: int = MAX_PIXELS, cache_bytes: int = CACHE_BYTES
) -> Eyes | None:
    """None for a model that cannot see, or whose files describe no image processor."""
    # Of older releases, `transformers` itself offers it to those who have torchvision alone.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    if model.config.model_type not in CAN_SEE:
        return None
    try:
        # Not torchvision's, which rounds otherwise: what a model sees must not depend on what else is installed.
        processor = AutoImageProcessor.from_pretrained(str(path), backend="pil")
    except (OSError, ValueError):
        return None
    return Eyes(model, processor, max_pixels, cache_bytes)


def _one(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Of a batch of one image."""
    return found if isinstance(found, Tensor) else found[0]
