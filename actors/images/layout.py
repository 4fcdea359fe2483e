"""Where images are in a sequence of tokens, and in a packed row: ids, positions, and what the decoder gets of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...wire.errors import InvalidRequestError
from ...wire.model_input import Chunk, ImageChunk, ModelInput
from .eyes import Eyes, Sight, the_eyes
from .pictures import Digest, Picture

_IDS = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Placed:
    """An image whose first token is number `start` of its sequence. `sight` is what was seen, until it was let go."""

    start: int
    height: int
    width: int
    picture: Picture
    sight: Sight | None = None

    @property
    def end(self) -> int:
        return self.start + self.height * self.width


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Of one sequence. What comes after its `positions` has its own place plus `offset` for a position."""

    placed: tuple[Placed, ...]
    positions: _IDS  # [3, tokens]: in time, down, across
    offset: int

    @property
    def nbytes(self) -> int:
        """Of what was seen, as far as it is held."""
        return sum(image.sight.nbytes for image in self.placed if image.sight is not None)

    def let_go(self) -> "Images":
        """Without what was seen: should it be wanted again, it is looked at again."""
        return replace(self, placed=tuple(replace(image, sight=None) for image in self.placed))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens `start` to `end` of a sequence, laid into a packed row."""

    start: int
    end: int
    images: Images | None


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the decoder gets of images: see `Sight`. `places` are the packed row's, in order."""

    places: Tensor  # [n] int64
    embeddings: Tensor  # [n, hidden]
    layers: tuple[Tensor, ...]  # [n, hidden] each


@dataclass(frozen=True, slots=True)
class Counted:
    """An input that says of each image how many tokens it is, and its pictures in order."""

    tokens: ModelInput
    pictures: tuple[Picture, ...]


def count_images(name: str, tokens: ModelInput, eyes: Eyes | None, max_context: int) -> Counted:
    """Only the heads of files are read.

    Raises InvalidRequestError for a file that is none, one that is too large, or where the caller expected others; and
    as soon as there are more than `max_context` tokens.
    """
    if not tokens.has_images:
        return Counted(tokens, ())
    chunks: list[Chunk] = []
    pictures: list[Picture] = []
    length = 0
    for i, chunk in enumerate(tokens.chunks):
        if isinstance(chunk, ImageChunk):
            where = f"{name}.chunks[{i}]"
            picture, count = the_eyes(where, eyes).open(where, chunk)
            pictures.append(picture)
            chunk = chunk._replace(expected_tokens=count)
        chunks.append(chunk)
        length += chunk.length
        if length > max_context:
            problem = f"{name} has {length} tokens up to chunk {i}, expected at most {max_context}, the model's context"
            raise InvalidRequestError(problem, field=name)
    return Counted(ModelInput(chunks), tuple(pictures))


def lay_out_positions(placed: Sequence[Placed], tokens: int) -> Images:
    """As Qwen2-VL has them (M-RoPE, arXiv:2409.12191): text counts on in all three; an image's tokens have one time,
    and count down and across from it; what follows goes on behind the larger of the two."""
    positions = np.empty((3, tokens), dtype=np.int64)
    at = next_ = 0
    for image in placed:
        positions[:, at : image.start] = np.arange(next_, next_ := next_ + image.start - at)
        down, across = np.divmod(np.arange(image.height * image.width), image.width)
        positions[:, image.start : image.end] = next_ + np.stack((np.zeros_like(down), down, across))
        at, next_ = image.end, next_ + max(image.height, image.width)
    positions[:, at:] = np.arange(next_, next_ := next_ + tokens - at)
    return Images(tuple(placed), positions, next_ - tokens)


def positions_of(stretches: Sequence[Stretch]) -> _IDS:
    """[tokens], or [3, tokens] where an image's tokens are among them."""
    each = [_positions(stretch) for stretch in stretches]
    if not any(_placed(stretch) for stretch in stretches):
        return np.concatenate([positions[0] for positions in each])
    return np.concatenate(each, axis=1)


def seen_in(stretches: Sequence[Stretch], eyes: Eyes | None, device: torch.device, at: int = 0) -> Seen | None:
    """Of stretches that lie end to end in a packed row from `at` on; None where no image's tokens are among them."""
    places: list[_IDS] = []
    parts: list[tuple[Tensor, ...]] = []
    for stretch in stretches:
        for image in _placed(stretch):
            sight = image.sight or the_eyes(image.picture.name, eyes).see(image.picture)
            first, last = max(stretch.start, image.start), min(stretch.end, image.end)
            places.append(np.arange(first, last) + (at - stretch.start))
            chosen = slice(first - image.start, last - image.start)
            parts.append(tuple(tensor[chosen] for tensor in (sight.embeddings, *sight.layers)))
        at += stretch.end - stretch.start
    if not parts:
        return None
    embeddings, *layers = (torch.cat(tensors).to(device) for tensors in zip(*parts, strict=True))
    return Seen(torch.from_numpy(np.concatenate(places)).to(device), embeddings, tuple(layers))


def _positions(stretch: Stretch) -> _IDS:
    """[3, tokens]"""
    start, end, images = stretch.start, stretch.end, stretch.images
    if images is None:
        return np.broadcast_to(np.arange(start, end), (3, end - start))
    inside = images.positions[:, start:end]
    after = np.arange(max(start, images.positions.shape[1]), max(end, images.positions.shape[1])) + images.offset
    return np.concatenate((inside, np.broadcast_to(after, (3, len(after)))), axis=1)


def _placed(stretch: Stretch) -> list[Placed]:
    images = () if stretch.images is None else stretch.images.placed
    return [image for image in images if image.start < stretch.end and stretch.start < image.end]


def ids_of_image(digest: Digest, tokens: int) -> list[int]:
    """All below 0: the digest's words over and over, each with the sign's bit."""
    words = np.frombuffer(digest, "<i8") | np.iinfo(np.int64).min
    return np.resize(words, tokens).tolist()
