"""How many of the smallest commands a second a broker accepts, journals, plans, hands out, and answers.

A broker process with its journal on the disk, an actor process that ends at once whatever it is given, and clients that
keep `--window` commands under way in each of `--runs` runs. The processor time that the broker took says what it could
do on a core of its own, whoever else has the machine; the time of one command alone, sent when the one before has
ended, says what it adds. Beside it a bare broker, which journals and answers and does nothing else. Prints a table and
a JSON line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import anyio
import psutil
from rich.console import Console
from rich.table import Table

import lorry
from bench.bare import measure as measure_bare
from bench.goals import at_least, at_most, settle
from lorry.storage.store import Store
from lorry.wire.ids import TenantId
from tests.conftest import MODEL
from tests.network.parts import TOKEN, broker
from tests.scheduler.scripted import scripted_actor

COMMANDS_PER_CORE = 15_000
ALONE_MS = 2.0


@dataclass(frozen=True, slots=True)
class Found:
    commands_per_s: float
    per_core_second: float
    """Commands for each second of the broker's processor time."""
    alone_ms: list[float]
    thread_us: Mapping[str, float]
    """Processor time of a command, by thread; empty where the system does not name threads."""


async def measure(data: Path, runs: int, window: int, commands: int) -> Found:
    with broker(data, 60) as part, closing(Store(data)) as store:
        key = store.create_key(TenantId("bench"), time.time())
        process = psutil.Process(part.process.pid)
        async with (
            null_actor(part.announced["actors"]),
            lorry.connect(part.announced["clients"], api_key=key) as service,
        ):
            every = [await service.create_lora_training_client_async(MODEL, 1) for _ in range(runs)]
            await work(every, window, commands // 10)
            before, threads, started = cpu_seconds(process), by_thread(process), time.perf_counter()
            await work(every, window, commands)
            seconds, cpu = time.perf_counter() - started, cpu_seconds(process) - before
            thread_us = {name: 1e6 * (now - threads[name]) / commands for name, now in by_thread(process).items()}
            return Found(commands / seconds, commands / cpu, [await one(every[0]) for _ in range(200)], thread_us)


@asynccontextmanager
async def null_actor(address: str) -> AsyncGenerator[None]:
    command = [sys.executable, "-m", "bench.broker", "--actor", address]
    async with await anyio.open_process(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        await process.stdout.receive()
        yield
        process.terminate()


async def act(address: str) -> None:
    async with scripted_actor(address, TOKEN["LORRY_ACTOR_TOKEN"], MODEL):
        print("ready", flush=True)
        await anyio.sleep_forever()


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def by_thread(process: psutil.Process) -> dict[str, float]:
    """Seconds of its main thread, of the journal's (and what else works for the loop), and of ZeroMQ's."""
    seconds = defaultdict[str, float](float)
    if sys.platform == "linux":
        for thread in process.threads():
            named = Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text()
            name = "main" if thread.id == process.pid else "ZeroMQ's" if named.startswith("ZMQ") else "the journal's"
            seconds[name] += thread.user_time + thread.system_time
    return seconds


async def work(every: list[lorry.TrainingClient], window: int, commands: int) -> None:
    async with anyio.create_task_group() as tasks:
        for training in every:
            tasks.start_soon(step, training, window, commands // len(every))


async def step(training: lorry.TrainingClient, window: int, commands: int) -> None:
    params = lorry.AdamParams()
    under_way = [training.optim_step(params) for _ in range(window)]
    for sent in range(window, commands):
        await under_way[sent % window]
        under_way[sent % window] = training.optim_step(params)
    for future in under_way:
        await future


async def one(training: lorry.TrainingClient) -> float:
    started = time.perf_counter()
    await training.optim_step(lorry.AdamParams())
    return 1e3 * (time.perf_counter() - started)


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--window", type=int, default=64, help="commands of a run that are under way")
    parser.add_argument("--commands", type=int, default=20_000)
    parser.add_argument("--actor", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.actor:
        anyio.run(act, options.actor)
        return []
    with tempfile.TemporaryDirectory() as data:
        found = anyio.run(measure, Path(data), options.runs, options.window, options.commands)
        bare = measure_bare(Path(data, "bare.db"), options.commands, options.runs * options.window)
    low, middle, high = statistics.quantiles(found.alone_ms, n=4)
    bare_low, bare_middle, bare_high = statistics.quantiles(bare.alone_ms, n=4)
    title = f"{options.commands:,} commands, {options.runs} runs of {options.window}"
    table = Table("", "found", "goal", "a bare one", title=title)
    table.add_row(
        "commands a second of the broker's processor time",
        f"{found.per_core_second:,.0f}",
        f"{COMMANDS_PER_CORE:,}",
        f"{bare.per_core_second:,.0f}",
    )
    for name, us in found.thread_us.items():
        table.add_row(f"of each command {name} thread, µs", f"{us:.0f}", "", "")
    table.add_row("commands a second, all processes on this machine", f"{found.commands_per_s:,.0f}", "", "")
    table.add_row(
        "one alone, ms",
        f"{middle:.2f} ({low:.2f} to {high:.2f})",
        f"{ALONE_MS}",
        f"{bare_middle:.2f} ({bare_low:.2f} to {bare_high:.2f})",
    )
    Console().print(table)
    facts = {
        "per_core_second": found.per_core_second,
        "per_s": found.commands_per_s,
        "alone_ms": [middle, low, high],
        "thread_us": found.thread_us,
        "bare": {"per_core_second": bare.per_core_second, "alone_ms": [bare_middle, bare_low, bare_high]},
    }
    print(json.dumps({"bench": "broker"} | facts))
    missed = at_least("commands a second of the broker's processor time", found.per_core_second, COMMANDS_PER_CORE)
    return missed + at_most("milliseconds of a command alone", middle, ALONE_MS)


if __name__ == "__main__":
    settle(main())
