"""Waiting at a start for a disk that refuses, as the writer waits for it later. What is damaged is not waited for."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential

from lorry.wire.errors import StorageUnavailableError

log = structlog.get_logger("lorry.serve")

T = TypeVar("T")

_LONGEST_PAUSE_S = 5.0


async def when_the_disk_allows(start: Callable[[], Awaitable[T]]) -> T:
    """What `start` returns, which is called again for as long as it raises StorageUnavailableError."""
    attempts = AsyncRetrying(
        retry=retry_if_exception_type(StorageUnavailableError),
        wait=wait_exponential(multiplier=0.25, max=_LONGEST_PAUSE_S),
        before_sleep=_tell_once,
    )
    started = await attempts(start)
    if attempts.statistics["attempt_number"] > 1:
        log.info("the disk can be used, and the start goes on")
    return started


def _tell_once(attempt: RetryCallState) -> None:
    if attempt.attempt_number == 1:
        error = attempt.outcome.exception() if attempt.outcome else None
        log.error("the disk is waited for, and the start goes on by itself when it can be used", error=str(error))
