"""Files that claim to be images: broken, or made to cost whoever reads them memory or time. Knows nothing of Lorry, so
that those who use the official SDK can send them too."""

import struct
import zlib
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True)
class Hostile:
    """`says` is part of what is to be answered."""

    name: str
    data: bytes
    format: str
    says: str
    expected_tokens: int | None = None


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_head(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def black(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, and next to no bytes."""
    body = zlib.compress(bytes(1 + -(-width // 8)) * height, 9)
    return png_head(width, height, 1, 0) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    image.save(file := BytesIO(), format, **options)
    return file.getvalue()


def usual() -> bytes:
    """A PNG of 32 x 32 pixels with nothing wrong about it."""
    return saved(_noise(), "png")


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


@cache
def hostile() -> list[Hostile]:
    png, jpeg = usual(), saved(_noise(), "jpeg")
    progressive = saved(_noise().resize((64, 64)), "jpeg", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    frame = jpeg.index(b"\xff\xc0")
    return [
        Hostile("a bomb of 100 megapixels", black(10_000, 10_000), "png", "10000 x 10000 pixels"),
        Hostile("a claim of 4 exapixels", png_head(2**31 - 1, 2**31 - 1) + png[33:], "png", "2147483647 pixels"),
        Hostile("a claim of no pixels", png_head(0, 5) + png[33:], "png", "0 x 5 pixels"),
        Hostile("a PNG cut in half", png[: len(png) // 2], "png", "broken png"),
        Hostile("a PNG cut in its head", png[:20], "png", "not begin as one"),
        Hostile("a PNG without pixels", png[:33] + png_chunk(b"IEND", b""), "png", "broken png"),
        Hostile("a PNG with a flipped byte", png[:60] + bytes([png[60] ^ 255]) + png[61:], "png", "broken png"),
        Hostile("a PNG of three bits", png_head(32, 32, 3) + png[33:], "png", "broken png"),
        Hostile("a PNG of 100,000 chunks", png[:33] + png_chunk(b"teXt", b"") * 100_000 + png[33:], "png", "chunks"),
        Hostile("a strip of 4,000 by 1", saved(_noise().resize((4000, 1)), "png"), "png", "aspect ratio"),
        Hostile("a JPEG cut in half", jpeg[: len(jpeg) - 200], "jpeg", "broken jpeg"),
        Hostile("a JPEG cut in its head", jpeg[:100], "jpeg", "no segment where one should be"),
        Hostile("a JPEG of 1,000 scans", progressive[:-2] + 1000 * last_scan + b"\xff\xd9", "jpeg", "32 scans"),
        Hostile("a JPEG of 1,000,000 comments", jpeg[:2] + b"\xff\xfe\0\2" * 10**6 + jpeg[2:], "jpeg", "segments"),
        Hostile("a JPEG behind 4 MB of fill", jpeg[:2] + b"\xff" * 2**22 + jpeg[2:], "jpeg", "no segment where"),
        Hostile("a JPEG with junk in its head", jpeg[:2] + b"a" * 2**22 + jpeg[2:], "jpeg", "no segment where"),
        Hostile("a JPEG of 100 frames", jpeg[:frame] + 100 * jpeg[frame : frame + 19] + jpeg[frame:], "jpeg", "frames"),
        Hostile("a JPEG of unknown parts", jpeg[:2] + b"\xff\xf0\xff\xff" + bytes(65533) + jpeg[2:], "jpeg", "0xF0"),
        Hostile("a JPEG of arithmetic", jpeg[:frame] + b"\xff\xc9" + jpeg[frame + 2 :], "jpeg", "0xC9"),
        Hostile("a JPEG of 2,000 tables", jpeg[:2] + 2000 * table(jpeg) + jpeg[2:], "jpeg", "too many tables"),
        Hostile("a PNG called JPEG", png, "jpeg", "not begin as one"),
        Hostile("a GIF called PNG", saved(_noise(), "gif"), "png", "not begin as one"),
        Hostile("a text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "png", "not begin as one"),
        Hostile("nothing", b"", "png", "not begin as one"),
        Hostile("other tokens than there are", png, "png", "expected_tokens is 7, expected 16", 7),
        Hostile("a claim of more tokens than a context holds", black(4096, 4096), "png", "expected_tokens is 300", 300),
    ]


def harmless() -> dict[str, tuple[bytes, str]]:
    """Of 32 x 32 pixels, with parts that would be dear to read, and that nobody reads."""
    png, jpeg = usual(), saved(_noise(), "jpeg")
    swollen = b"a\0\0" + zlib.compress(bytes(2**20 - 1), 9)
    broken = swollen[:-1] + bytes([swollen[-1] ^ 255])
    app = b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65527)
    return {
        "4,000 profiles that swell": (png[:33] + 4000 * png_chunk(b"iCCP", swollen) + png[33:], "png"),
        "4,000 texts that swell": (png[:33] + 4000 * png_chunk(b"zTXt", broken) + png[33:], "png"),
        "1,000 pieces of Exif": (jpeg[:2] + 1000 * app + jpeg[2:], "jpeg"),
        "a film behind it": (jpeg + 100 * jpeg, "jpeg"),
    }


def table(jpeg: bytes) -> bytes:
    """One of its own."""
    at = jpeg.index(b"\xff\xdb")
    return jpeg[at : at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])]
