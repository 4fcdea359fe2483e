"""Reads PNG and JPEG files that nobody trusts: what a file claims is checked before anything of it is decoded."""

import struct
import zlib
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from typing import NewType

from PIL import Image

from ...wire.errors import InvalidRequestError
from ...wire.model_input import ImageChunk, ImageFormat
from .structure import Structure, structure_of

Digest = NewType("Digest", bytes)

_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise, depending on where a file is broken."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A file whose head has been read. `name` is where the caller wrote it; `digest` is of the bytes."""

    name: str
    data: bytes = field(repr=False)
    format: ImageFormat
    digest: Digest
    structure: Structure = field(repr=False)

    @property
    def width(self) -> int:
        return self.structure.width

    @property
    def height(self) -> int:
        return self.structure.height


def open_picture(name: str, chunk: ImageChunk, max_pixels: int) -> Picture:
    """Decodes nothing. Raises InvalidRequestError for what is no such image, or one of more than `max_pixels`."""
    data = chunk.data
    try:
        structure = structure_of(data, chunk.format)
    except ValueError as error:
        problem = f"{name} has {len(data):,} bytes that are no {chunk.format} to be read: {error}"
        raise InvalidRequestError(problem, field=name) from error
    if structure.width * structure.height > max_pixels:
        size = f"{structure.width} x {structure.height} pixels"
        problem = f"{name} has {size}, expected at most {max_pixels:,}: make it smaller"
        raise InvalidRequestError(problem, field=name)
    return Picture(name, data, chunk.format, Digest(sha256(data).digest()), structure)


def pixels_of(picture: Picture) -> Image.Image:
    """Decoded, as RGB. Raises InvalidRequestError for a file that is broken behind its head."""
    try:
        with Image.open(BytesIO(picture.structure.plain(picture.data)), formats=[picture.format]) as image:
            if image.size != (picture.width, picture.height):
                raise ValueError(f"it is {image.size[0]} x {image.size[1]} pixels in truth")
            return image.convert("RGB")
    except _FAULTS as error:
        problem = f"{picture.name} is a broken {picture.format} ({_reason(error)})"
        raise InvalidRequestError(problem, field=picture.name) from error


def _reason(error: Exception) -> str:
    """Pillow names the file object, whose address says nothing to anybody."""
    return (str(error) or type(error).__name__).partition(" <_io")[0].splitlines()[0]
