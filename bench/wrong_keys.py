"""What somebody who tries wrong keys costs one who has a right one: a request of the latter, over HTTP and over ZeroMQ,
with and without `--tries` wrong keys that are tried meanwhile, in turns.

The request asks what a run is, which a gateway passes on to the broker, and the broker answers from memory; one after
the other. Wrong keys come from a process of its own, over `--connections` connections, each as soon as the one before
was answered, and none twice. Prints medians and 95th percentiles, their ratios with and without, of neighbouring turns,
with quartiles, and a JSON line.
"""

import argparse
import itertools
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx
from anyio import to_thread
from anyio.streams.buffered import BufferedByteReceiveStream
from rich.console import Console
from rich.table import Table

import lorry
from bench.engine import ratios, shown
from bench.goals import at_most, settle
from lorry.actors.config import ActorSettings
from lorry.client.connection import open_connection
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import serving
from lorry.wire import sockets
from lorry.wire.catalogue_messages import Query
from lorry.wire.client_messages import VERSION, Hello
from lorry.wire.codec import encode

MODEL, GOAL = Path("tests/assets/base-model"), 1.25
ANYTHING: Any = Any
AT_LEAST = 50
"""Requests in a turn."""

Ask = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Found:
    """Milliseconds, and ratios as median, lower and upper quartile."""

    way: str
    alone_ms: float
    beside_ms: float
    alone_p95_ms: float
    beside_p95_ms: float
    median_ratio: tuple[float, float, float]
    p95_ratio: tuple[float, float, float]
    tries_per_s: float


async def measure(data: Path, tries: int, turns: int, connections: int) -> list[Found]:
    config = ServeConfig(
        (ModelConfig("m", str(MODEL)),),
        data,
        "tcp://127.0.0.1:*",
        "127.0.0.1:0",
        actor=ActorSettings(threads=1),
        log_level="warning",
    )
    async with serving(config) as deployment:
        key = await deployment.create_key("right")
        async with (
            lorry.connect(deployment.address, api_key=key) as service,
            open_connection(deployment.address, key) as connection,
            httpx.AsyncClient(base_url=f"{deployment.url}/api/v1", headers={"X-API-Key": key}, timeout=None) as http,
        ):
            run = (await service.create_lora_training_client_async("m", rank=8)).model_id

            async def over_http() -> object:
                return (await http.post("get_info", json={"model_id": run})).raise_for_status()

            async def over_zeromq() -> object:
                return await connection.ask(Query(connection.next_request(), "run", run), ANYTHING)

            ways = {"HTTP": (over_http, deployment.url or ""), "ZeroMQ": (over_zeromq, deployment.address)}
            return [
                await compared(way, ask, door, turns, tries // turns, connections) for way, (ask, door) in ways.items()
            ]


async def compared(way: str, ask: Ask, door: str, turns: int, tries: int, connections: int) -> Found:
    alone, beside, rates = list[list[float]](), list[list[float]](), list[float]()
    async with attacker(door, connections) as begin:
        await spent(ask, lambda done: done < AT_LEAST)
        for _ in range(turns):
            started, over = time.perf_counter(), await begin(tries)
            beside.append(await spent(ask, lambda done, over=over: done < AT_LEAST or not over.is_set()))
            await over.wait()
            rates.append(tries / (time.perf_counter() - started))
            most = len(beside[-1])
            alone.append(await spent(ask, lambda done, most=most: done < most))
    medians = [[statistics.median(turn) for turn in each] for each in (alone, beside)]
    tails = [[statistics.quantiles(turn, n=20)[-1] for turn in each] for each in (alone, beside)]
    alone_ms, beside_ms, alone_p95_ms, beside_p95_ms = (statistics.median(each) for each in (*medians, *tails))
    return Found(
        way,
        alone_ms,
        beside_ms,
        alone_p95_ms,
        beside_p95_ms,
        ratios(medians[1], medians[0]),
        ratios(tails[1], tails[0]),
        statistics.median(rates),
    )


async def spent(ask: Ask, goes_on: Callable[[int], bool]) -> list[float]:
    """Milliseconds of each request."""
    found: list[float] = []
    while goes_on(len(found)):
        started = time.perf_counter()
        await ask()
        found.append(1e3 * (time.perf_counter() - started))
    return found


# Who tries wrong keys, in a process of its own ---------------------------------------------------------------------


@asynccontextmanager
async def attacker(door: str, connections: int) -> AsyncGenerator[Callable[[int], Awaitable[anyio.Event]]]:
    """Begins so many tries when it is told, and gives an event that is set when they are over."""
    command = [sys.executable, "-m", "bench.wrong_keys", "--door", door, "--connections", str(connections)]
    async with await anyio.open_process(command, stderr=None) as process, anyio.create_task_group() as tasks:
        assert process.stdin is not None and process.stdout is not None
        told, lines = process.stdin, BufferedByteReceiveStream(process.stdout)

        async def hear(over: anyio.Event) -> None:
            await lines.receive_until(b"\n", 100)
            over.set()

        async def begin(tries: int) -> anyio.Event:
            over = anyio.Event()
            await told.send(b"%d\n" % tries)
            tasks.start_soon(hear, over)
            return over

        yield begin
        await told.aclose()


async def attack(door: str, connections: int) -> None:
    tried = itertools.count()
    one = try_over_http if door.startswith("http") else try_over_zeromq

    async def repeat(times: int) -> None:
        async with one(door, tried) as once:
            for _ in range(times):
                await once()

    while line := await to_thread.run_sync(sys.stdin.readline):
        async with anyio.create_task_group() as tasks:
            for _ in range(connections):
                tasks.start_soon(repeat, int(line) // connections)
        print("over", flush=True)


@asynccontextmanager
async def try_over_http(url: str, tried: Iterator[int]) -> AsyncGenerator[Ask]:
    """Bare, so that it takes as little of the machine as it can."""
    place = urlsplit(url)
    async with await anyio.connect_tcp(place.hostname or "", place.port or 0) as stream:
        answers = BufferedByteReceiveStream(stream)

        async def once() -> None:
            key = f"X-API-Key: tml-wrong-{os.getpid()}-{next(tried)}"
            await stream.send(f"GET /api/v1/training_runs HTTP/1.1\r\nHost: x\r\n{key}\r\n\r\n".encode())
            head = (await answers.receive_until(b"\r\n\r\n", 64 * 1024)).lower()
            assert head.startswith((b"http/1.1 401", b"http/1.1 429")), head
            await answers.receive_exactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))

        yield once


@asynccontextmanager
async def try_over_zeromq(address: str, tried: Iterator[int]) -> AsyncGenerator[Ask]:
    with sockets.connect(address, None, b"mallory" + secrets.token_bytes(8)) as door:

        async def once() -> None:
            door.send([encode(Hello(VERSION, f"tml-wrong-{next(tried)}", "mallory"))])
            await door.receive()

        yield once


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--door", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.door:
        anyio.run(attack, options.door, options.connections)
        return []
    with tempfile.TemporaryDirectory() as data:
        found = anyio.run(measure, Path(data), options.tries, options.turns, options.connections)
    table = Table("a request with a right key", *(each.way for each in found), title=f"{options.tries:,} wrong keys")
    table.add_row("alone, ms: median, p95", *(f"{each.alone_ms:.2f}, {each.alone_p95_ms:.2f}" for each in found))
    table.add_row("beside, ms: median, p95", *(f"{each.beside_ms:.2f}, {each.beside_p95_ms:.2f}" for each in found))
    table.add_row("ratio of medians", *(shown(each.median_ratio) for each in found))
    table.add_row("ratio of 95th percentiles", *(shown(each.p95_ratio) for each in found))
    table.add_row("wrong keys a second", *(f"{each.tries_per_s:,.0f}" for each in found))
    Console().print(table)
    print(json.dumps({"bench": "wrong_keys", "found": [asdict(each) for each in found]}))
    return [
        line
        for each in found
        for line in at_most(f"a right key's request beside wrong keys, over {each.way}", each.median_ratio[0], GOAL)
    ]


if __name__ == "__main__":
    settle(main())
