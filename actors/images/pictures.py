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
from .structure import too_busy

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

Image.MAX_IMAGE_PIXELS = None  # a limit of ours is checked instead, which is lower and has no warnings


@dataclass(frozen=True, slots=True)
class Picture:
    """A file whose head has been read. `name` is where the caller wrote it; `digest` is of the bytes."""

    name: str
    data: bytes = field(repr=False)
    format: ImageFormat
    digest: Digest
    width: int
    height: int


def open_picture(name: str, chunk: ImageChunk, max_pixels: int) -> Picture:
    """Decodes nothing. Raises InvalidRequestError for what is no such image, or one of more than `max_pixels`."""
    data = chunk.data
    if problem := too_busy(data, chunk.format):
        problem = f"{name} is a {chunk.format} with {problem}: save it anew"
        raise InvalidRequestError(problem, field=name)
    try:
        with Image.open(BytesIO(data), formats=[chunk.format]) as image:
            width, height = image.size
    except _FAULTS as error:
        problem = f"{name} has {len(data):,} bytes that are no {chunk.format} ({_reason(error)})"
        raise InvalidRequestError(problem, field=name) from error
    if width * height > max_pixels:
        problem = f"{name} has {width} x {height} pixels, expected at most {max_pixels:,}: make it smaller"
        raise InvalidRequestError(problem, field=name)
    return Picture(name, data, chunk.format, Digest(sha256(data).digest()), width, height)


def pixels_of(picture: Picture) -> Image.Image:
    """Decoded, as RGB. Raises InvalidRequestError for a file that is broken behind its head."""
    try:
        with Image.open(BytesIO(picture.data), formats=[picture.format]) as image:
            return image.convert("RGB")
    except _FAULTS as error:
        problem = f"{picture.name} is a broken {picture.format} ({_reason(error)})"
        raise InvalidRequestError(problem, field=picture.name) from error


def _reason(error: Exception) -> str:
    """Pillow names the file object, whose address says nothing to anybody."""
    return (str(error) or type(error).__name__).partition(" <_io")[0].splitlines()[0]
