"""The broker with its journal on the disk and an actor that ends at once whatever it is given: how long the smallest
commands take by how many are sent a second."""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import anyio
import anyio.lowlevel
import psutil

import lorry
from bench.broker import cpu_seconds, null_actor
from bench.curves.curve import Point
from lorry.storage.store import Store
from lorry.wire.errors import LorryError
from lorry.wire.ids import TenantId
from tests.conftest import MODEL
from tests.network.parts import broker

RUNS, SECONDS, MOST = 64, 3.0, 20_000
_TICK_S = 0.002


def commands(at: Sequence[int]) -> Iterator[Point]:
    """`optim_step`s at so many a second, whatever became of those before, over 64 runs in turn."""
    yield from anyio.run(_commands, at)


async def _commands(at: Sequence[int]) -> list[Point]:
    with tempfile.TemporaryDirectory() as data, broker(Path(data), 60) as part, closing(Store(Path(data))) as store:
        key = store.create_key(TenantId("bench"), time.time())
        process = psutil.Process(part.process.pid)
        async with (
            null_actor(part.announced["actors"]),
            lorry.connect(part.announced["clients"], api_key=key, timeout_s=120) as service,
        ):
            every = [await service.create_lora_training_client_async(MODEL, 1) for _ in range(RUNS)]
            return [await _offered(every, rate, process) for rate in at]


async def _offered(every: Sequence[lorry.TrainingClient], rate: int, process: psutil.Process) -> Point:
    latencies, failed = list[float](), 0
    count = min(MOST, max(20, round(rate * SECONDS)))

    async def wait(command: lorry.Future[lorry.OptimStepResponse], due: float) -> None:
        nonlocal failed
        try:
            await command
            latencies.append(time.perf_counter() - due)
        except LorryError:
            failed += 1

    started, cpu_s = time.perf_counter(), cpu_seconds(process)
    async with anyio.create_task_group() as tasks:
        for i in range(count):
            due = started + i / rate
            if (early := due - time.perf_counter()) > _TICK_S:
                await anyio.sleep(early)
            elif i % 100 == 0:
                await anyio.lowlevel.checkpoint()
            due = min(due, time.perf_counter())  # some are sent a little early, a few at a time
            tasks.start_soon(wait, every[i % RUNS].optim_step(lorry.AdamParams()), due)
    seconds, cpu_s = time.perf_counter() - started, cpu_seconds(process) - cpu_s
    cuts = statistics.quantiles(latencies, n=100)
    return Point(
        rate,
        {
            "ended/s": len(latencies) / seconds,
            "p50 ms": 1e3 * cuts[49],
            "p99 ms": 1e3 * cuts[98],
            "failed": failed,
            "% of a core, the broker": 100 * cpu_s / seconds,
        },
    )
