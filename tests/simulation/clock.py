"""An event loop whose time is a number: where another would wait, it moves the clock. Nothing outside can wake it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

START = 1_700_000_000.0
"""Unix seconds at the beginning of a history."""
_MOST_TURNS = 400_000


class NeverEndsError(Exception):
    """The loop turns and turns, or has nothing to wait for, and the history does not end."""


class VirtualLoop(asyncio.base_events.BaseEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._now, self._turns = 0.0, 0
        self._selector = self  # the base class waits by asking it
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        self._turns += 1
        if timeout is None or self._turns > _MOST_TURNS:
            raise NeverEndsError(f"after {self._turns} turns, at {self._now:.3f} s")
        self._now += max(0.0, timeout)
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class Clock:
    """What the broker takes for the module `time`."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def time(self) -> float:
        return START + self._loop.time()

    def monotonic(self) -> float:
        return self._loop.time()


def run(loop: VirtualLoop, main: Coroutine[Any, Any, None]) -> None:
    try:
        loop.run_until_complete(main)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
