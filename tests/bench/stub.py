"""A server that takes known times, and the world of a run without a clock."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from lorry.bench.drive import Marks, Seat, drive
from lorry.bench.records import Record
from lorry.bench.requests import Batch, Prompt
from lorry.bench.workload import Tenant, Workload
from tests.simulation.clock import VirtualLoop
from tests.simulation.clock import run as run_virtually


class Refused(Exception):
    pass


class Stub:
    """Each request takes as many seconds as `takes` says of its name and number, or fails where that is None. At most
    `at_once` are worked on at a time, the others wait."""

    def __init__(self, takes: Callable[[str, int], float | None], at_once: int = 10**6) -> None:
        self._takes, self._places = takes, anyio.Semaphore(at_once)

    @asynccontextmanager
    async def seat(self, tenant: Tenant, name: str) -> AsyncGenerator[Seat]:
        yield StubSeat(name, self._takes, self._places)


class StubSeat:
    def __init__(self, name: str, takes: Callable[[str, int], float | None], places: anyio.Semaphore) -> None:
        self._name, self._takes, self._places, self._came = name, takes, places, 0

    async def train(self, batch: Batch, marks: Marks) -> None:
        marks.acknowledged()
        await self._work()

    async def sample(self, prompt: Prompt, marks: Marks) -> int:
        await self._work()
        for _ in range(3):
            marks.token()
            await anyio.sleep(0.25)
        return 3

    async def _work(self) -> None:
        self._came += 1
        seconds = self._takes(self._name, self._came)
        async with self._places:
            if seconds is None:
                raise Refused("come later")
            await anyio.sleep(seconds)


def driven(workload: Workload, stub: Stub, **options: Any) -> list[Record]:
    found = list[Record]()

    async def main() -> None:
        found.extend(await drive(workload, stub, lambda record: None, **options))

    run_virtually(VirtualLoop(), main())
    return found
