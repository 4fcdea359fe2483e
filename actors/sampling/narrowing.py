"""What cannot be computed together is computed in parts, until it is clear whose fault it was. Runs no model itself.

Rows and chunks of prompts do not depend on each other, nor does a token on who shares its step: what goes through in
parts comes out as it would have at once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import structlog
import torch

from ...wire.errors import InternalError, LorryError, OutOfMemoryError
from ..model.memory import memory_ran_out
from .lineup import Chunk, Seat
from .sequences import Request, Row

P = TypeVar("P", bound=Row | Chunk | Seat)
R = TypeVar("R")

log = structlog.get_logger("lorry.actor")


def in_parts(
    pieces: Sequence[P], attempt: Callable[[Sequence[P]], R], postponed: set[Request] | None = None
) -> Iterator[tuple[Sequence[P], R]]:
    """What comes of `attempt` for all pieces, or for parts of them where it raises, in their order.

    A piece that cannot be computed alone sets its request's `error`, and the request's other pieces are left out from
    then on. Where `postponed` is given, memory is short for a while only: such a request goes there instead, and may be
    computed later. An accelerator in an error state does not recover: that error is raised. `attempt` must leave
    everything as it was where it raises.
    """
    later = set[Request]() if postponed is None else postponed
    waiting: list[Sequence[P]] = [pieces]
    while waiting:
        some = [p for p in waiting.pop() if p.request.error is None and p.request not in later]
        if not some:
            continue
        try:
            result = attempt(some)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            # Only what it says is kept: its traceback holds the tensors of the attempt.
            short, problem = memory_ran_out(error), f"{type(error).__name__}: {error}"
            parts = _divide(some, short)
            if parts or short:
                log.warning("computing in parts", pieces=len(some), tokens=sum(map(_size, some)), problem=problem)
            else:
                log.exception("internal error", request=some[0].request.key)
        else:
            yield some, result
            continue
        if not parts and short and postponed is not None:
            postponed.add(some[0].request)
        elif not parts:
            some[0].request.error = _failure(some[0], short, problem)
        waiting += reversed(parts)


def _divide(pieces: Sequence[P], short: bool) -> list[Sequence[P]]:
    """In two, of about as many tokens each. A chunk by itself is divided where it wanted too much memory."""
    if len(pieces) > 1:
        half, at = sum(map(_size, pieces)) / 2, 0
        while at < len(pieces) - 1 and (at == 0 or sum(map(_size, pieces[: at + 1])) <= half):
            at += 1
        return [pieces[:at], pieces[at:]]
    piece = pieces[0]
    if short and isinstance(piece, Chunk) and _size(piece) > 1:
        middle = piece.start + _size(piece) // 2
        halves = [[Chunk(piece.stem, piece.start, middle)], [Chunk(piece.stem, middle, piece.end)]]
        return cast("list[Sequence[P]]", halves)
    return []


def _size(piece: Row | Chunk | Seat) -> int:
    return piece.end - piece.start if isinstance(piece, Chunk) else 1


def _failure(piece: Row | Chunk | Seat, short: bool, problem: str) -> LorryError:
    if isinstance(piece, Chunk):
        where = f"token {piece.start + 1} of a sequence of {len(piece.stem.tokens)}"
    else:
        row = piece.row if isinstance(piece, Seat) else piece
        where = f"the token after {row.length} tokens, in sample {row.sample},"
    if short:
        return OutOfMemoryError(f"{where} does not fit into the actor's memory, even alone", field="prompt")
    return InternalError(f"{where} raised {problem}")
