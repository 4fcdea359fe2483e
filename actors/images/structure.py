"""How much work a file's structure makes, told from its markers alone: some files of little size are made to keep
whoever reads them busy. Pure."""

from ...wire.model_input import ImageFormat

MAX_PARTS = 4096
"""A PNG's chunks, a JPEG's segments before its data: both are walked in Python. A hundred are many."""
MAX_SCANS = 32
"""Of a JPEG. Each goes over all of the image, and takes next to nothing in the file; ten are usual."""
_DATA_OF_A_PART = 1024
"""Of a PNG's pixels, on average at least: encoders write 8 KiB and more to a chunk."""

_SIGNATURES: dict[ImageFormat, bytes] = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8"}
_SCAN = b"\xff\xda"  # which entropy-coded data never has
_BARE = frozenset((0x00, 0x01, *range(0xD0, 0xDA)))
"""JPEG's markers without a segment, and what stands for no marker at all."""


def too_busy(data: bytes, format: ImageFormat) -> str | None:
    """What there is too much of in a file that calls itself such an image; None where all is usual."""
    if not data.startswith(_SIGNATURES[format]):
        return None  # no reader looks any further
    if format == "png":
        most = MAX_PARTS + len(data) // _DATA_OF_A_PART
        return f"more than {most:,} chunks" if _png_parts(data, most) > most else None
    if (scans := data.count(_SCAN)) > MAX_SCANS:
        return f"{scans:,} scans, more than {MAX_SCANS}"
    return f"more than {MAX_PARTS:,} segments before its data" if _jpeg_parts(data) > MAX_PARTS else None


def _png_parts(data: bytes, most: int) -> int:
    """Chunks up to the image's end; counting ends above `most`."""
    at, parts = 8, 0
    while at < len(data) and parts <= most and data[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(data[at : at + 4])
        parts += 1
    return parts


def _jpeg_parts(data: bytes) -> int:
    """Segments up to the first scan, and every byte that is between them."""
    at, parts = 2, 0
    while parts <= MAX_PARTS:
        start = data.find(b"\xff", at)
        if start < 0:
            return parts + len(data) - at
        parts += start - at + 1
        marker = data[start + 1] if start + 1 < len(data) else _SCAN[1]
        if marker == _SCAN[1]:
            break
        at = start + (1 if marker == 0xFF else 2)
        if marker != 0xFF and marker not in _BARE:
            at += int.from_bytes(data[at : at + 2])
    return parts
