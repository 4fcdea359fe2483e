"""What a long run leaves on disk and in the broker's memory: commands of 100 KB through one run, and no save_state.

A broker in a process of its own, with an actor that computes nothing and saves the run whenever the journal holds
another 64 MiB of its commands, as a real one does. Prints what was found at most while it went on, and what was left,
with a JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import anyio
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

import lorry
from bench.goals import at_most, settle
from lorry.storage.blobs import FOLDER
from lorry.storage.connection import FILE
from lorry.storage.store import Store
from lorry.wire.codec import encode
from lorry.wire.commands import ForwardBackwardInput
from lorry.wire.ids import TenantId
from lorry.wire.model_input import ModelInput
from lorry.wire.types import Datum, TensorData
from tests.scheduler.scripted import scripted_actor

MIB = 1 << 20
JOURNAL_BYTES = 64 * MIB
"""`actors.adapters.behind` saves a run that has so much in the journal; two saved states have to cover a command."""
GOAL_FILES_MIB = 2 * JOURNAL_BYTES / MIB + 64
GOAL_DATABASE_MIB = 32
GOAL_MEMORY_MIB = 128
UNDER_WAY = 100
TOKEN = "token"


@dataclass(slots=True)
class Sizes:
    """In MiB, each at its largest."""

    database: float = 0.0
    files: float = 0.0
    memory: float = 0.0

    def look(self, data: Path, broker: psutil.Process, memory_before: float) -> None:
        self.database = max(self.database, total_bytes(data.glob(f"{FILE}*")) / MIB)
        self.files = max(self.files, total_bytes(data.glob(f"{FOLDER}/*")) / MIB)
        self.memory = max(self.memory, broker.memory_info().rss / MIB - memory_before)


@dataclass(slots=True)
class Result:
    commands: int
    sent_mib: float
    seconds: float
    most: Sizes = field(default_factory=Sizes)
    left: Sizes = field(default_factory=Sizes)


@contextmanager
def broker(data: Path) -> Generator[tuple[psutil.Process, str, str]]:
    """With its addresses for clients and for actors."""
    anywhere = "tcp://127.0.0.1:*"
    words = ["broker", "--model", "m", "--data", str(data), "--bind", anywhere, "--actor-bind", anywhere]
    command = [sys.executable, "-m", "lorry", "--log-level", "warning", *words]
    environment = os.environ | {"LORRY_ACTOR_TOKEN": TOKEN}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        addresses = json.loads(process.stdout.readline())
        try:
            yield psutil.Process(process.pid), addresses["clients"], addresses["actors"]
        finally:
            process.terminate()


def total_bytes(files: Iterable[Path]) -> int:
    """Of those that are still there."""
    total = 0
    for file in files:
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def datum(i: int) -> Datum:
    """About 100 KB on the wire."""
    tokens = (np.arange(7200) + i) % 1000
    inputs = {"target_tokens": TensorData.from_numpy(tokens), "weights": TensorData.from_numpy(np.ones(7200, "f"))}
    return Datum(ModelInput.from_ints(tokens.tolist()), inputs)


async def measure(data: Path, commands: int) -> Result:
    size = len(encode(ForwardBackwardInput([datum(0)], "cross_entropy")))
    with broker(data) as (process, clients, actors):
        async with (
            scripted_actor(actors, TOKEN, "m", save_every=JOURNAL_BYTES // size),
            lorry.connect(clients, api_key=new_key(data), timeout_s=60) as service,
        ):
            training = await service.create_lora_training_client_async("m", rank=8)
            await training.forward_backward([datum(0)], "cross_entropy")
            before = process.memory_info().rss / MIB
            result = Result(commands, commands * size / MIB, 0.0)
            start = time.perf_counter()
            for first in range(0, commands, UNDER_WAY):
                futures = [training.forward_backward([datum(first + i)], "cross_entropy") for i in range(UNDER_WAY)]
                for future in futures:
                    await future
                result.most.look(data, process, before)
            result.seconds = time.perf_counter() - start
            result.left.look(data, process, before)
            return result


def new_key(data: Path) -> str:
    store = Store(data)
    try:
        return store.create_key(TenantId("bench"), time.time())
    finally:
        store.close()


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", type=int, default=10_000)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as data:
        result = anyio.run(measure, Path(data), options.commands)
    title = f"{result.commands:,} commands, {result.sent_mib:,.0f} MiB in {result.seconds:.0f} s"
    table = Table("MiB", "at most", "at the end", title=title)
    for name in ("database", "files", "memory"):
        table.add_row(name, f"{getattr(result.most, name):.0f}", f"{getattr(result.left, name):.0f}")
    Console().print(table)
    print(json.dumps({"bench": "journal", "result": asdict(result)}))
    return [
        *at_most("MiB of the database", result.most.database, GOAL_DATABASE_MIB),
        *at_most("MiB of files beside it", result.most.files, GOAL_FILES_MIB),
        *at_most("MiB of memory that the broker gained", result.most.memory, GOAL_MEMORY_MIB),
    ]


if __name__ == "__main__":
    settle(main())
