"""Tokens of a sample as they are made: pieces of its sequences, each with its place, so that one that is told twice is
known, and one that was not told is missed. Pure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from .codec import decode
from .errors import StreamDivergedError
from .types import SampleResponse, StopReason, TopkLogprobs


class Piece(msgspec.Struct, frozen=True, omit_defaults=True):
    """`tokens` [n] and `logprobs` [n] of sequence number `sample` of a request, from its token number `start` on.
    `stop_reason` None: it goes on."""

    sample: int
    start: int
    tokens: list[int]
    logprobs: list[float]
    topk_logprobs: list[TopkLogprobs] | None = None
    stop_reason: StopReason | None = None


class Resumed(msgspec.Struct, frozen=True):
    """A sample that another actor began: the `request` as its client encoded it, and what was told of it, in order:
    each an encoded list of pieces."""

    request: bytes
    made: list[bytes]


@dataclass(slots=True)
class Told:
    """Of one sequence. `stop_reason` None: it goes on."""

    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    topk_logprobs: list[TopkLogprobs] = field(default_factory=list[TopkLogprobs])
    stop_reason: StopReason | None = None

    def agrees_with(self, piece: Piece) -> bool:
        """`piece` begins at none of the tokens that are not known."""
        end, seen = piece.start + len(piece.tokens), len(self.tokens)
        common = min(end, seen)
        same = piece.tokens[: common - piece.start] == self.tokens[piece.start : common]
        return same and not (end > seen and self.stop_reason) and not (end < seen and piece.stop_reason)

    def add(self, new: Piece) -> None:
        self.tokens += new.tokens
        self.logprobs += new.logprobs
        self.topk_logprobs += new.topk_logprobs or []
        self.stop_reason = new.stop_reason or self.stop_reason


class Assembly:
    """What is known of a request's sequences. Whatever comes twice is dropped, and what comes too early is left to the
    result, which has all."""

    def __init__(self, samples: int) -> None:
        self.told = [Told() for _ in range(samples)]

    def add(self, pieces: Iterable[Piece]) -> list[Piece]:
        """What is new in them. Raises StreamDivergedError where a token is another one than was told before."""
        return [new for piece in pieces if (new := self._new(piece)) is not None]

    def rest(self, response: SampleResponse) -> list[Piece]:
        """What is new in the result. Raises StreamDivergedError."""
        return self.add(whole(response))

    def _new(self, piece: Piece) -> Piece | None:
        told = self.told[piece.sample] if 0 <= piece.sample < len(self.told) else None
        if told is None or not 0 <= piece.start <= len(told.tokens):
            return None
        if not told.agrees_with(piece):
            raise StreamDivergedError(f"sample {piece.sample} was computed anew, and is another than was streamed")
        new = _from(piece, len(told.tokens) - piece.start)
        if not new.tokens and (new.stop_reason is None or told.stop_reason is not None):
            return None
        told.add(new)
        return new


def _from(piece: Piece, seen: int) -> Piece:
    """Without its first `seen` tokens."""
    if seen == 0:
        return piece
    top = None if piece.topk_logprobs is None else piece.topk_logprobs[seen:]
    place = piece.start + min(seen, len(piece.tokens))
    return Piece(piece.sample, place, piece.tokens[seen:], piece.logprobs[seen:], top, piece.stop_reason)


def whole(response: SampleResponse) -> list[Piece]:
    """One for each sequence."""
    return [
        Piece(sample, 0, found.tokens, found.logprobs, found.topk_logprobs, found.stop_reason)
        for sample, found in enumerate(response.sequences)
    ]


def made_before(made: Sequence[bytes], samples: int) -> Assembly:
    """What was told of a request with so many samples, as far as it goes together."""
    assembly = Assembly(samples)
    for payload in made:
        assembly.add(decode(payload, list[Piece]))
    return assembly
