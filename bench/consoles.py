"""What open consoles cost: of a core the broker, and of a command its median.

On the model of the demo, through broker, actor and gateway: four tenants train, a step each four times a second, while
`--consoles` pages are open and told of it, signed in one by one: three quarters of them look at a run, the others at
lists, at what waits and, as administrators, at the deployment. In turns without and with them, `--seconds` each: the
broker's processor time by the wall's, the gateway's, and how long a `forward_backward` of a fifth tenant takes, one
after the other. Prints a table and a JSON line.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import anyio
import httpx
import psutil
from anyio.abc import TaskStatus
from rich.console import Console
from rich.table import Table

import lorry
from bench.goals import at_most, settle
from lorry.actors.config import ActorSettings
from lorry.administration import administer
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import Deployment, serving
from lorry.service import Service
from lorry.wire.admin_messages import CreateKey, KeyCreated, new_key_id
from lorry.wire.ids import TenantId

MODEL = Path("tests/assets/base-model")
TENANTS, STEP_EVERY_S, TOKENS = 4, 0.25, 32
OF_A_CORE, ADDED_MS = 0.05, 1.0
SETTLED_S = 3.0


@dataclass(slots=True)
class Turn:
    """Shares of a core; milliseconds of each command; events that the pages were sent."""

    broker: float
    gateway: float
    commands_ms: list[float]
    events: int = 0


@dataclass(slots=True)
class Pages:
    """What all open pages were sent."""

    events: int = 0
    lost: int = 0


def datum() -> lorry.Datum:
    tokens = [random.randrange(4, 1000) for _ in range(TOKENS + 1)]
    return lorry.Datum(lorry.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})


async def train(deployment: Deployment, key: str, *, task_status: TaskStatus[str]) -> None:
    """For ever, at its pace; it has started when its run is there."""
    async with lorry.connect(deployment.address, api_key=key) as service:
        training = await service.create_lora_training_client_async("m", rank=8)
        task_status.started(training.model_id)
        for step in range(10**9):
            started = anyio.current_time()
            backward = training.forward_backward([datum()], "cross_entropy")
            await training.optim_step(lorry.AdamParams(learning_rate=1e-4))
            training.log_metrics({"reward": random.random()}, step=step)
            await backward
            await anyio.sleep_until(started + STEP_EVERY_S)


async def administrator(deployment: Deployment) -> str:
    order = CreateKey(new_key_id(), TenantId("admin"), scopes=["admin"])
    service = Service(deployment.address, deployment.server_key, deployment.data)
    return (await administer(service, order, KeyCreated)).api_key


def places(consoles: int, keys: Sequence[str], runs: Sequence[str], admin: str) -> list[tuple[str, str]]:
    """With which key each page is open, and what it follows."""
    found: list[tuple[str, str]] = []
    for i in range(consoles):
        key, run = keys[i % TENANTS], runs[i % TENANTS]
        match i % 20:
            case 0:
                found.append((admin, urlencode({"page": "deployment"})))
            case 1:
                found.append((key, urlencode({"page": "waiting"})))
            case 2 | 3 | 4:
                found.append((key, urlencode({"page": "runs"})))
            case _:
                found.append((key, urlencode({"page": "run", "run": run})))
    return found


async def look(url: str, key: str, what: str, pages: Pages, *, task_status: TaskStatus[None]) -> None:
    """One page, signed in by itself, open when this has started. Its events are counted, not read: a browser has a
    machine of its own."""
    host = urlsplit(url)
    async with httpx.AsyncClient(base_url=url, headers={"origin": url}, timeout=None) as http:
        answer = await http.post("/console/sign-in", data={"api_key": key})
        cookie = answer.headers["set-cookie"].partition(";")[0]
    async with await anyio.connect_tcp(host.hostname or "", host.port or 80) as stream:
        head = f"GET /console/live?{what} HTTP/1.1\r\nhost: {host.netloc}\r\ncookie: {cookie}\r\n"
        await stream.send((head + "accept: text/event-stream\r\n\r\n").encode())
        await stream.receive()
        task_status.started()
        async for piece in stream:
            pages.events += piece.count(b"event: ")
    pages.lost += 1


@asynccontextmanager
async def opened(url: str, found: Sequence[tuple[str, str]]) -> AsyncGenerator[Pages]:
    pages = Pages()
    async with anyio.create_task_group() as tasks:
        for key, what in found:
            await tasks.start(look, url, key, what, pages)
        yield pages
        assert not pages.lost, f"{pages.lost} pages were closed"
        tasks.cancel_scope.cancel()


async def turn(training: lorry.TrainingClient, processes: Sequence[psutil.Process], seconds: float) -> Turn:
    await anyio.sleep(SETTLED_S)
    before, started = [busy(process) for process in processes], time.perf_counter()
    took: list[float] = []
    while (now := time.perf_counter()) < started + seconds:
        await training.forward_backward([datum()], "cross_entropy")
        took.append(1e3 * (time.perf_counter() - now))
    wall = time.perf_counter() - started
    broker, gateway = ((busy(process) - was) / wall for process, was in zip(processes, before, strict=True))
    return Turn(broker, gateway, took)


def busy(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def processes_of(deployment: Deployment) -> list[psutil.Process]:
    by_name = {child.name: child.process for child in deployment.children}
    return [psutil.Process(process.pid) for name in ("broker", "gateway") if (process := by_name[name])]


async def measure(data: Path, consoles: int, seconds: float, turns: int) -> dict[bool, list[Turn]]:
    """Without any, and with all."""
    config = ServeConfig(
        (ModelConfig("m", str(MODEL)),),
        data,
        "tcp://127.0.0.1:*",
        "127.0.0.1:0",
        actor=ActorSettings(threads=1),
        log_level="warning",
    )
    found: dict[bool, list[Turn]] = {False: [], True: []}
    async with serving(config) as deployment, anyio.create_task_group() as tasks:
        keys = [await deployment.create_key(f"tenant-{n}") for n in range(TENANTS + 1)]
        runs: list[str] = [await tasks.start(train, deployment, key) for key in keys[:TENANTS]]
        wanted = places(consoles, keys, runs, await administrator(deployment))
        async with lorry.connect(deployment.address, api_key=keys[-1]) as service:
            training = await service.create_lora_training_client_async("m", rank=8)
            await training.forward_backward([datum()], "cross_entropy")
            processes = processes_of(deployment)
            assert deployment.url is not None
            for _ in range(turns):
                found[False].append(await turn(training, processes, seconds))
                async with opened(deployment.url, wanted) as pages:
                    told = pages.events
                    found[True].append(await turn(training, processes, seconds))
                    found[True][-1].events = pages.events - told
        tasks.cancel_scope.cancel()
    return found


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--consoles", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=4)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = anyio.run(measure, Path(folder), options.consoles, options.seconds, options.turns)
    without, beside = found[False], found[True]
    brokers = [more.broker - less.broker for less, more in zip(without, beside, strict=True)]
    added = [median(more) - median(less) for less, more in zip(without, beside, strict=True)]
    table = Table("turn", "broker", "with", "gateway", "with", "median ms", "with", "events/s", title="of a core")
    for number, (less, more) in enumerate(zip(without, beside, strict=True)):
        cells = (f"{less.broker:.3f}", f"{more.broker:.3f}", f"{less.gateway:.3f}", f"{more.gateway:.3f}")
        medians = (f"{median(less):.2f}", f"{median(more):.2f}", f"{more.events / options.seconds:.0f}")
        table.add_row(str(number + 1), *cells, *medians)
    Console().print(table)
    broker, ms = statistics.median(brokers), statistics.median(added)
    print(f"{options.consoles} consoles: {broker:.3f} of a core of the broker's, {ms:+.2f} ms of a command's median")
    print(json.dumps({"bench": "consoles", "broker": brokers, "added_ms": added}))
    return at_most("of a core", broker, OF_A_CORE) + at_most("ms of a command's median", ms, ADDED_MS)


def median(turn: Turn) -> float:
    return statistics.median(turn.commands_ms)


if __name__ == "__main__":
    settle(main())
