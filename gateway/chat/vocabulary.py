"""A tokenizer's vocabulary, as far as sampled tokens become text. Pure: nothing here loads anything."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_ONE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`decode` makes text of tokens, `pieces` their names. `added` tokens are whole words of their own, of which the
    `special` ones are never shown. A decoder is `byte_level` or it spells what it has no word for in single bytes."""

    decode: Callable[[list[int]], str]
    piece: Callable[[int], str | None]
    added: Mapping[str, int] = field(default_factory=dict[str, int])
    special: frozenset[int] = frozenset()
    byte_level: bool = True

    def ends_whole(self, token: int) -> bool:
        """Whether no token after this one can change what it spells."""
        return self.byte_level or not _ONE_BYTE.fullmatch(self.piece(token) or "")

    def bytes_of(self, token: int) -> bytes:
        """What a token spells by itself: part of a character, perhaps."""
        piece = self.piece(token)
        if piece is None:
            return b""
        if piece in self.added:
            return piece.encode()
        if self.byte_level:
            if all(character in _BYTES for character in piece):
                return bytes(_BYTES[character] for character in piece)
            return piece.encode()
        if _ONE_BYTE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def name_of(self, token: int) -> str:
        """A token as text that no other has, for lists of logprobs."""
        spelt = self.bytes_of(token)
        try:
            return spelt.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


def is_byte_level(decoder: str) -> bool:
    """Of the `tokenizers` library's description of a decoder, in JSON."""
    return any(part.get("type") == "ByteLevel" for part in _parts(json.loads(decoder or "null")))


def _parts(decoder: Any) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    return [decoder, *(part for inner in decoder.get("decoders", []) for part in _parts(inner))]


def _alphabet() -> dict[str, int]:
    """GPT-2's: a printable character for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()
