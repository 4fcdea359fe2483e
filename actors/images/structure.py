"""What a PNG or JPEG file claims, and which of its bytes its pixels are made of, told from its markers alone. Pure.

Files are made to keep whoever reads them busy: with a million empty parts, profiles that swell, scans that cost nothing
in the file. So the rest of a file never reaches a decoder, and what does is bounded.
"""

import re
from dataclasses import dataclass

from ...wire.model_input import ImageFormat

MAX_PARTS = 4096
"""A PNG's chunks, a JPEG's segments: a hundred are many."""
MAX_SCANS = 32
"""Of a JPEG. Each goes over all of the image, and takes next to nothing in the file; ten are usual."""
MAX_TABLES = 64 * 1024
"""Bytes of what a JPEG's data is decoded by."""
_DATA_OF_A_PART = 1024
"""Of a PNG's pixels, on average at least: encoders write 8 KiB and more to a chunk."""

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_KEPT_CHUNKS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
"""Baseline, extended, progressive; the others are lossless, hierarchical or arithmetic."""
_TABLES = frozenset((0xC4, 0xDB, 0xDD))
_JFIF, _ADOBE = 0xE0, 0xEE
"""They say which colours the components are."""
_SCAN, _END = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""In entropy-coded data: neither a stuffed byte nor a restart."""


@dataclass(frozen=True, slots=True)
class Structure:
    """`parts` are the ranges of bytes to give to a decoder, laid end to end."""

    width: int
    height: int
    parts: tuple[tuple[int, int], ...]

    def plain(self, data: bytes) -> bytes:
        return b"".join(data[start:end] for start, end in self.parts)


def structure_of(data: bytes, format: ImageFormat) -> Structure:
    """Raises ValueError for what is no such file, for one of no pixels, and for one that is made to be dear."""
    found = _png(data) if format == "png" else _jpeg(data)
    if not (found.width and found.height):
        raise ValueError(f"it has {found.width} x {found.height} pixels")
    return found


def _png(data: bytes) -> Structure:
    if data[:8] != _PNG or data[12:16] != b"IHDR" or data[8:12] != b"\0\0\0\x0d" or len(data) < 33:
        raise ValueError("it does not begin as one")
    most = MAX_PARTS + len(data) // _DATA_OF_A_PART
    parts, at = [(0, 8)], 8
    for _ in range(most):
        end, kind = at + 12 + int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if kind in _KEPT_CHUNKS:
            parts.append((at, end))
        if kind == b"IEND" or end >= len(data):
            return Structure(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), tuple(parts))
        at = end
    raise ValueError(f"it has more than {most:,} chunks: save it anew")


def _jpeg(data: bytes) -> Structure:
    if data[:2] != _JPEG:
        raise ValueError("it does not begin as one")
    size, parts, at, colours = None, [(0, 2)], 2, set[int]()
    for _ in range(MAX_PARTS):
        start, kind, end = _segment(data, at)
        if kind in _FRAMES:
            if size is not None or data[start + 9 : start + 10] not in (b"\1", b"\3", b"\4"):
                raise ValueError("it has several frames, or not one, three or four colours")
            size = int.from_bytes(data[start + 7 : start + 9]), int.from_bytes(data[start + 5 : start + 7])
            parts.append((start, end))
        elif kind in _TABLES or (kind in (_JFIF, _ADOBE) and kind not in colours):
            colours.add(kind)
            parts.append((start, end))
        elif kind == _SCAN:
            if size is None or sum(last - first for first, last in parts) > MAX_TABLES:
                raise ValueError("it has no frame before its data, or too many tables")
            parts.append((start, _end_of_scans(data, end)))
            return Structure(*size, tuple(parts))
        elif not (kind == 0xFE or 0xE0 <= kind <= 0xEF):  # a comment, or some application's
            raise ValueError(f"it has a segment of kind 0x{kind:02X}, which is not read")
        at = end
    raise ValueError(f"it has more than {MAX_PARTS:,} segments before its data: save it anew")


def _segment(data: bytes, at: int) -> tuple[int, int, int]:
    """Of the segment at a place: where it starts, of what kind it is, and where the next one starts."""
    found = _MARKER.match(data, at, at + 16)
    if found is None:
        raise ValueError(f"it has no segment where one should be, at byte {at:,}")
    start = found.end() - 2
    return start, found.group(1)[0], found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2]))


def _end_of_scans(data: bytes, at: int) -> int:
    """Behind the image's end, or the file's. Between scans there may be tables."""
    scans = 1
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, at)
        if found is None:
            return len(data)
        kind = found.group(1)[0]
        if kind == _END:
            return found.end()
        scans += kind == _SCAN
        if scans > MAX_SCANS:
            raise ValueError(f"it has more than {MAX_SCANS} scans: save it as a JPEG that is not progressive")
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2]))
    raise ValueError(f"it has more than {MAX_PARTS:,} segments between its scans: save it anew")
