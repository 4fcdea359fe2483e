"""By when what is asked for is to be over."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from ..wire.errors import DeadlineExceededError

_DEADLINE: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextmanager
def deadline(seconds: float) -> Generator[None]:
    """Whatever is asked for in the block is to be over so many seconds after the block began: the server ends what is
    not, and its future raises DeadlineExceededError. What a device has begun to train is not broken off. Of deadlines
    inside each other the earliest counts."""
    at, outer = time.monotonic() + seconds, _DEADLINE.get()
    token = _DEADLINE.set(at if outer is None else min(at, outer))
    try:
        yield
    finally:
        _DEADLINE.reset(token)


def time_left() -> float | None:
    """In seconds. Raises DeadlineExceededError where there is none; nothing was sent then."""
    if (at := _DEADLINE.get()) is None:
        return None
    if (left := at - time.monotonic()) <= 0:
        raise DeadlineExceededError("the deadline had passed when this was called, and nothing was sent")
    return left
