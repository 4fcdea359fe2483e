"""What a model reads: tokens and images, in chunks."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec

ImageFormat: TypeAlias = Literal["png", "jpeg"]


class EncodedTextChunk(msgspec.Struct, frozen=True):
    tokens: list[int]

    @property
    def length(self) -> int:
        return len(self.tokens)


class ImageChunk(NamedTuple):
    """A file's bytes, for a model that can see. How many tokens it is, the model's own image processor tells: where
    `expected_tokens` is there, it must be that number. What marks an image's beginning and end is text around it.
    """

    data: bytes
    format: ImageFormat
    expected_tokens: int | None = None

    @property
    def length(self) -> int:
        """Raises ValueError where `expected_tokens` is None."""
        if self.expected_tokens is None:
            raise ValueError("how many tokens an image is, is not known here without its expected_tokens")
        return self.expected_tokens


Chunk: TypeAlias = EncodedTextChunk | ImageChunk


class ModelInput(msgspec.Struct, frozen=True):
    """A sequence of tokens, in chunks."""

    chunks: list[Chunk]

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> "ModelInput":
        return cls([EncodedTextChunk(list(tokens))])

    @classmethod
    def empty(cls) -> "ModelInput":
        return cls([])

    def to_ints(self) -> list[int]:
        """Raises ValueError where there is an image."""
        if self.has_images:
            raise ValueError("an image has no token ids")
        texts = [chunk.tokens for chunk in self.chunks if isinstance(chunk, EncodedTextChunk)]
        return texts[0] if len(texts) == 1 else [token for tokens in texts for token in tokens]

    def append(self, chunk: Chunk) -> "ModelInput":
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> "ModelInput":
        return self.append(EncodedTextChunk([token]))

    @property
    def length(self) -> int:
        """In tokens. Raises ValueError where an image has no `expected_tokens`."""
        return sum(chunk.length for chunk in self.chunks)

    @property
    def known_length(self) -> int | None:
        """The same, None where it is not known."""
        return None if any(chunk.expected_tokens is None for chunk in self.images) else self.length

    @property
    def images(self) -> list[ImageChunk]:
        return [chunk for chunk in self.chunks if isinstance(chunk, ImageChunk)]

    @property
    def has_images(self) -> bool:
        return any(isinstance(chunk, ImageChunk) for chunk in self.chunks)
