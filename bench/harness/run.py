"""One benchmark: a workload against a server, as often as is wanted, and files of all that came of it."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import msgspec

from .drive import Server, Tell, drive
from .figures import RunFigures, figures_of
from .page import page_of
from .records import Record, write_records
from .sweep import Point, point_of, scaled
from .totals import Facts, Totals, totals_of
from .workload import Workload

Began = Callable[[str], None]
"""Hears what begins."""


async def run(
    workload: Workload, server: Server, facts: Facts, folder: Path, repeats: int, began: Began, tell: Tell
) -> Totals:
    """In `folder`, which is made: requests-1.jsonl and so on, totals.json and page.html."""
    found, records = list[RunFigures](), list[Record]()
    async with _made(folder):
        for number in range(1, repeats + 1):
            began(f"run {number} of {repeats}")
            records = await drive(workload, server, tell)
            await anyio.to_thread.run_sync(write_records, folder / f"requests-{number}.jsonl", records)
            found.append(figures_of(workload, records))
        totals = totals_of(facts, workload, found)
        await anyio.Path(folder, "totals.json").write_bytes(msgspec.json.format(msgspec.json.encode(totals)))
        page = await anyio.to_thread.run_sync(page_of, totals, records)
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


@asynccontextmanager
async def _made(folder: Path) -> AsyncGenerator[None]:
    """Before anything is measured, which must not be lost for want of it; gone again where nothing came."""
    await anyio.Path(folder).mkdir(parents=True)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True), suppress(OSError):
            await anyio.Path(folder).rmdir()  # which only takes an empty one
