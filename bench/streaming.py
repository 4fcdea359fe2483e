"""How soon a token is with who streams it, what streaming costs, and what a reader costs who stops reading.

On the model of the demo, through broker and actor processes: (1) from the end of the decode step that drew a token to
its arrival in this process, for 1, 8 and 64 streams, over ZeroMQ and over HTTP (OpenAI's endpoint, server-sent
events), beside the length of a step; (2) tokens a second of the same sequences streamed and not, in turns; (3) the time
to the first token beside a run that always trains, over that of an idle service, for a share of a half; (4) tokens a
second of streams beside as many that nobody reads, over beside as many that are read. Prints tables and a JSON line.
"""

import argparse
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import httpx
from rich.console import Console
from rich.table import Table

import lorry
from bench.engine import datum, ratios, shown
from bench.goals import at_least, at_most, settle
from lorry.actors.config import ActorSettings
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import serving

MODEL, ACTOR = Path("tests/assets/base-model"), Path(__file__).parent / "stamped_actor.py"
GOAL_MS, SHARE, APART_S = 5.0, 0.5, 0.05
STREAMS, PROMPT_TOKENS, VOCAB = (1, 8, 64), 16, 1000


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds: of a step, and from its end to the arrival of its tokens, median and 95th percentile."""

    way: str
    streams: int
    step_ms: float
    median_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True)
class Found:
    """Ratios as median, lower and upper quartile."""

    latencies: list[Latency]
    streamed_over_not: tuple[float, float, float]
    first_token: tuple[float, float, float]
    beside_unread: tuple[float, float, float]


async def _stamping(command: list[str], **options: Any) -> Any:
    """Starts an actor as `stamped_actor` does."""
    if "actor" in command:
        command = [sys.executable, str(ACTOR), *command[3:]]
    return await _OPEN_PROCESS(command, **options)


_OPEN_PROCESS = anyio.open_process


@asynccontextmanager
async def deployed(data: Path) -> AsyncGenerator[Any]:
    settings = ActorSettings(threads=1, sample_rows=128, sample_share=SHARE)
    config = ServeConfig(
        (ModelConfig("m", str(MODEL)),), data, "tcp://127.0.0.1:*", "127.0.0.1:0", actor=settings, log_level="warning"
    )
    with mock.patch.object(anyio, "open_process", _stamping):
        async with serving(config) as deployment:
            yield deployment


def prompt() -> lorry.ModelInput:
    return lorry.ModelInput.from_ints([4 + secrets.randbelow(VOCAB - 4) for _ in range(PROMPT_TOKENS)])


def params(tokens: int) -> lorry.SamplingParams:
    return lorry.SamplingParams(max_tokens=tokens, stop=[])


async def measure(data: Path, tokens: int, turns: int) -> Found:
    os.environ["STAMPS"] = str(stamps := data / "stamps")
    async with deployed(data / "service") as deployment:
        key = await deployment.create_key("bench")
        async with lorry.connect(deployment.address, api_key=key) as service:
            sampler = await service.create_sampling_client_async(base_model="m")
            await all_of(sampler, 8, 8)
            latencies = [await over_zeromq(sampler, n, tokens, stamps) for n in STREAMS]
            latencies += [await over_http(deployment.url, key, n, tokens, stamps) for n in STREAMS]
            plain, streamed = list[float](), list[float]()
            for _ in range(turns):
                plain.append(await rate(sampler, 32, tokens, streams=False))
                streamed.append(await rate(sampler, 32, tokens, streams=True))
            rates: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(turns):
                for read, found in rates.items():
                    async with others(deployment.url, key, 16, 2 * tokens, read=read):
                        found.append(await rate(sampler, 16, tokens, streams=True))
            first = await first_tokens(service, sampler, turns)
        return Found(latencies, ratios(streamed, plain), first, ratios(rates[False], rates[True]))


# How soon ------------------------------------------------------------------------------------------------------------


async def over_zeromq(sampler: lorry.SamplingClient, streams: int, tokens: int, stamps: Path) -> Latency:
    arrived: dict[float, float] = {}

    async def read() -> None:
        async for piece in sampler.stream(prompt(), params(tokens)).pieces():
            arrived[piece.logprobs[0]] = time.monotonic()

    await together(read, streams)
    return latency("ZeroMQ", streams, stamps, arrived)


async def over_http(url: str, key: str, streams: int, tokens: int, stamps: Path) -> Latency:
    """Who asks for logprobs is sent each token as it comes, whatever its text is."""
    arrived: dict[float, float] = {}
    body = {"model": "m", "max_tokens": tokens, "stream": True, "logprobs": 0}
    headers = {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"{url}/v1", headers=headers, timeout=None, limits=limits) as http:

        async def read() -> None:
            told = body | {"prompt": prompt().to_ints()}
            async with http.stream("POST", "completions", json=told) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now, event = time.monotonic(), json.loads(line[6:])
                    for choice in event["choices"]:
                        if (made := choice["logprobs"]) and made["token_logprobs"]:
                            arrived[made["token_logprobs"][0]] = now

        await together(read, streams)
    return latency("HTTP", streams, stamps, arrived)


def latency(way: str, streams: int, stamps: Path, arrived: dict[float, float]) -> Latency:
    made: dict[float, float] = {}
    for line in stamps.read_text().splitlines():
        now, logprob = line.split()
        made[float(logprob)] = float(now)
    taken = [1e3 * (at - made[which]) for which, at in arrived.items() if which in made]
    moments = sorted({made[which] for which in arrived if which in made})
    steps = [1e3 * (later - earlier) for earlier, later in pairwise(moments)]
    return Latency(way, streams, statistics.median(steps), statistics.median(taken), percentile(taken))


def percentile(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


# What it costs -------------------------------------------------------------------------------------------------------


async def together(read: Any, times: int) -> None:
    async with anyio.create_task_group() as tasks:
        for _ in range(times):
            tasks.start_soon(read)


async def all_of(sampler: lorry.SamplingClient, sequences: int, tokens: int, *, streams: bool = False) -> None:
    async def read() -> None:
        if streams:
            async for _ in sampler.stream(prompt(), params(tokens)):
                pass
        else:
            await sampler.sample_async(prompt(), 1, params(tokens))

    await together(read, sequences)


async def rate(sampler: lorry.SamplingClient, sequences: int, tokens: int, *, streams: bool) -> float:
    """Tokens a second."""
    started = time.perf_counter()
    await all_of(sampler, sequences, tokens, streams=streams)
    return sequences * tokens / (time.perf_counter() - started)


@asynccontextmanager
async def others(url: str, key: str, readers: int, tokens: int, *, read: bool) -> AsyncGenerator[None]:
    """Streams over HTTP, which are under way all the while; nothing of them is read unless they are to `read`."""
    body = {"model": "m", "max_tokens": tokens, "stream": True, "logprobs": 5}
    address = httpx.URL(url)
    sockets = [await anyio.connect_tcp(address.host, address.port or 80) for _ in range(readers)]
    async with anyio.create_task_group() as tasks:
        for each in sockets:
            content = json.dumps(body | {"prompt": prompt().to_ints()}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            await each.send(head.encode() + content)
            if read:
                tasks.start_soon(drained, each)
        yield
        tasks.cancel_scope.cancel()
    for each in sockets:
        await anyio.aclose_forcefully(each)


async def drained(socket: anyio.abc.SocketStream) -> None:
    async for _ in socket:
        pass


async def first_tokens(
    service: lorry.ServiceClient, sampler: lorry.SamplingClient, turns: int
) -> tuple[float, float, float]:
    """Beside training, over alone."""
    training = await service.create_lora_training_client_async("m", rank=16)
    data = [datum(lorry_row()) for _ in range(16)]
    alone, beside = list[float](), list[float]()
    for _ in range(turns):
        alone.append(await median_first_token(sampler))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(train_on, training, data)
            await anyio.sleep(0.2)
            beside.append(await median_first_token(sampler))
            tasks.cancel_scope.cancel()
        await training.optim_step(lorry.AdamParams())
    return ratios(beside, alone)


def lorry_row() -> Any:
    import torch

    return torch.randint(4, VOCAB, (257,))


async def train_on(training: lorry.TrainingClient, data: list[lorry.Datum]) -> None:
    """Two are always under way."""
    waiting = [training.forward_backward(data, "cross_entropy") for _ in range(2)]
    while True:
        await waiting.pop(0)
        waiting.append(training.forward_backward(data, "cross_entropy"))


async def median_first_token(sampler: lorry.SamplingClient) -> float:
    """Of requests that come so far apart that they do not take up the share by themselves."""
    found: list[float] = []
    for _ in range(12):
        found.append(await first_token(sampler))
        await anyio.sleep(APART_S)
    return statistics.median(found)


async def first_token(sampler: lorry.SamplingClient) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    async with sampler.stream(prompt(), params(4)) as stream:
        async for _ in stream:
            break
        return 1e3 * (time.perf_counter() - started)


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--turns", type=int, default=8)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as data:
        found = anyio.run(measure, Path(data), options.tokens, options.turns)
    table = Table(
        "way", "streams", "a step, ms", "on its way, ms: median", "p95", title="from a step's end to its reader"
    )
    for each in found.latencies:
        times = (f"{value:.2f}" for value in (each.step_ms, each.median_ms, each.p95_ms))
        table.add_row(each.way, str(each.streams), *times)
    console = Console()
    console.print(table)
    costs = Table("what", "ratio: median (quartiles)")
    costs.add_row("tokens a second of 32 sequences, streamed over not", shown(found.streamed_over_not))
    costs.add_row("time to the first token beside training, over alone", shown(found.first_token))
    costs.add_row(
        "tokens a second of 16 streams beside 16 that nobody reads, over beside 16 that are read",
        shown(found.beside_unread),
    )
    console.print(costs)
    print(json.dumps({"bench": "streaming", **asdict(found)}))
    return [
        *(
            line
            for each in found.latencies
            for line in at_most(
                f"ms from a step's end to the reader of one of {each.streams} streams over {each.way}, beyond a step",
                each.median_ms - each.step_ms,
                GOAL_MS,
            )
        ),
        *at_most("the time to the first token beside training, over alone", found.first_token[0], 1 / SHARE),
        *at_least("streams beside as many that nobody reads, over beside read ones", found.beside_unread[0], 0.9),
    ]


if __name__ == "__main__":
    settle(main())
