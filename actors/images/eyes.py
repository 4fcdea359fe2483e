"""What of a model sees: its image processor and its frozen tower. Results are kept, as many as fit, by image."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import torch
from torch import Tensor

from ...wire.errors import InvalidRequestError
from ...wire.model_input import ImageChunk
from .pictures import Digest, Picture, open_picture, pixels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = structlog.get_logger("lorry.actor")

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

    def on_host(self) -> "Sight":
        return Sight(self.embeddings.cpu(), tuple(layer.cpu() for layer in self.layers), self.height, self.width)


@dataclass(frozen=True, slots=True)
class Pixels:
    """As the image processor lays them out. `height` and `width` are in patches."""

    patches: Tensor  # [patches, numbers] float32
    height: int
    width: int


def _nothing() -> None:
    pass


class Eyes:
    """Images of more than `max_pixels` are refused. `cache_bytes` of what was seen are kept, the latest.

    Files are decoded by a thread of its own, one after the other: `pixels_came`, which may be set, is called by it
    after each. `seen` counts the images that went through the tower.
    """

    def __init__(
        self, model: "PreTrainedModel", processor: Any, max_pixels: int = MAX_PIXELS, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.seen = 0
        self.pixels_came: Callable[[], None] = _nothing
        self._reader = ThreadPoolExecutor(1, "images")
        self._model, self._processor = model, processor
        self.cache_bytes = cache_bytes
        self._max_pixels = max_pixels
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

    def ask(self, picture: Picture) -> Future[Pixels] | None:
        """Has the picture decoded; None where it need not be."""
        if picture.digest in self._sights:
            return None
        pixels = self._reader.submit(self._pixels, picture)
        pixels.add_done_callback(lambda _: self.pixels_came())
        return pixels

    def see(self, picture: Picture, pixels: Future[Pixels] | None = None) -> Sight:
        """Runs the tower, unless the picture is known; `pixels` were asked for. Raises InvalidRequestError for a broken
        file."""
        sight = self._sights.pop(picture.digest, None)
        if sight is None:
            sight = self._look(self._pixels(picture) if pixels is None else pixels.result())
        self._sights[picture.digest] = sight
        while len(self._sights) > 1 and sum(each.nbytes for each in self._sights.values()) > self.cache_bytes:
            self._sights.popitem(last=False)
        return sight

    def _pixels(self, picture: Picture) -> Pixels:
        laid_out = self._processor(images=[pixels_of(picture)], return_tensors="pt")
        _, height, width = laid_out["image_grid_thw"][0].tolist()
        return Pixels(laid_out["pixel_values"], height, width)

    def _look(self, pixels: Pixels) -> Sight:
        # Alone, so that it sees the same whatever comes with it; and for training as well, whoever asked first.
        with torch.inference_mode(False), torch.no_grad():
            found: Any = self._model.model.get_image_features(  # pyright: ignore[reportCallIssue]
                pixels.patches.to(self._model.device, self._model.dtype),
                torch.tensor([[1, pixels.height, pixels.width]], device=self._model.device),
                return_dict=True,
            )
        self.seen += 1
        layers = tuple(_one(layer) for layer in found.deepstack_features)
        return Sight(_one(found.pooler_output), layers, pixels.height // self._side, pixels.width // self._side)


def the_eyes(name: str, eyes: Eyes | None) -> Eyes:
    """Raises InvalidRequestError, for the image of that name, where there are none."""
    if eyes is None:
        problem = f"{name} is an image, and this model is served without eyes: docs/models.md lists those that can see"
        raise InvalidRequestError(problem, field=name)
    return eyes


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
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        log.warning("the model is served without eyes: its files describe no image processor", reason=reason)
        return None
    return Eyes(model, processor, max_pixels, cache_bytes)


def _one(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Of a batch of one image."""
    return found if isinstance(found, Tensor) else found[0]
