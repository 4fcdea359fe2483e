"""One benchmark: a workload against a server, as often as is wanted, and files of all that came of it."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

import anyio
import msgspec

from lorry.wire.errors import LorryError

from .device import Reading
from .drive import Look, Server, Tell, drive
from .figures import RunFigures, figures_of
from .page import page_of
from .records import Record, write_records
from .sweep import Point, point_of, scaled
from .totals import Facts, Totals, totals_of
from .workload import Workload

Began = Callable[[str], None]
"""Hears what begins."""


@runtime_checkable
class Watched(Protocol):
    """A server whose actors somebody here can look at."""

    async def reading(self, at_s: float) -> Reading: ...


async def run(
    workload: Workload, server: Server, facts: Facts, folder: Path, repeats: int, began: Began, tell: Tell
) -> Totals:
    """In `folder`, which is made: requests-1.jsonl and so on, totals.json and page.html."""
    found, records, readings = list[RunFigures](), list[Record](), list[Reading]()
    async with _made(folder):
        for number in range(1, repeats + 1):
            began(f"run {number} of {repeats}")
            readings = list[Reading]()
            records = await drive(workload, server, tell, look=_looking(server, readings))
            await anyio.to_thread.run_sync(write_records, folder / f"requests-{number}.jsonl", records)
            found.append(figures_of(workload, records, readings))
        totals = totals_of(facts, workload, found)
        await anyio.Path(folder, "totals.json").write_bytes(msgspec.json.format(msgspec.json.encode(totals)))
        page = await anyio.to_thread.run_sync(page_of, totals, records, readings)
        await anyio.Path(folder, "page.html").write_text(page, encoding="utf-8")
    return totals


async def sweep(
    workload: Workload, server: Server, folder: Path, scales: Sequence[float], began: Began, tell: Tell
) -> list[Point]:
    """The smallest load first. In `folder`, which is made: requests-SCALE.jsonl of each, and sweep.json."""
    points = list[Point]()
    async with _made(folder):
        for scale in sorted(set(scales)):
            began(f"load {scale:g}")
            records = await drive(scaled(workload, scale), server, tell)
            await anyio.to_thread.run_sync(write_records, folder / f"requests-{scale:g}.jsonl", records)
            points.append(point_of(scale, figures_of(workload, records)))
        await anyio.Path(folder, "sweep.json").write_bytes(msgspec.json.format(msgspec.json.encode(points)))
    return points


def _looking(server: Server, readings: list[Reading]) -> Look | None:
    if not isinstance(server, Watched):
        return None

    async def look(at_s: float) -> None:
        with suppress(LorryError):  # what cannot be read for once must not end the measurement
            readings.append(await server.reading(at_s))

    return look


@asynccontextmanager
async def _made(folder: Path) -> AsyncGenerator[None]:
    """Before anything is measured, which must not be lost for want of it; gone again where nothing came."""
    await anyio.Path(folder).mkdir(parents=True)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True), suppress(OSError):
            await anyio.Path(folder).rmdir()  # which only takes an empty one
