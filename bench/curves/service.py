"""The demo's model through client, broker and actor: how they grow with runs that are registered, and with clients."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

import anyio
import zmq

import lorry
from bench.curves.curve import Point, spread
from bench.recovery import SETTINGS, STEP, TOKENS, datum, served

SLOTS, ROUNDS, TURNS = 8, 16, 5
SECONDS = 5.0


def runs(at: Sequence[int]) -> Iterator[Point]:
    """Rounds of eight runs, each a micro-batch and a step of all eight; of more than eight each time others, which
    have to be brought to the device. In turns with rounds of the same eight."""
    yield from anyio.run(_runs, at)


async def _runs(at: Sequence[int]) -> list[Point]:
    points = list[Point]()
    async with served(replace(SETTINGS, slots=SLOTS)) as (_, service):
        every = list[lorry.TrainingClient]()
        for count in at:
            while len(every) < count:
                every.append(await service.create_lora_training_client_async("bench", rank=8, seed=len(every)))
                await _step(every[-1])
            points.append(await _point(every))
    return points


async def _point(every: list[lorry.TrainingClient]) -> Point:
    turn_s, ratios = list[float](), list[float]()
    each = min(SLOTS, len(every))
    for turn in range(TURNS + 1):
        first = turn * ROUNDS * each
        others = [[every[(first + r * each + i) % len(every)] for i in range(each)] for r in range(ROUNDS)]
        spent = await _rounds(others)
        same = await _rounds([every[:each]] * (ROUNDS + 1))
        if turn:
            turn_s.append(statistics.median(spent))
            ratios.append(statistics.median(spent) / statistics.median(same[1:]))
    ms = spread([1e3 * s for s in turn_s])
    return Point(len(every), {"ms a round of 8": ms, "over the same 8 runs": spread(ratios)})


async def _rounds(rounds: Sequence[Sequence[lorry.TrainingClient]]) -> list[float]:
    spent = list[float]()
    for chosen in rounds:
        started = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for run in chosen:
                tasks.start_soon(_step, run)
        spent.append(time.perf_counter() - started)
    return spent


async def _step(run: lorry.TrainingClient) -> None:
    ended = run.forward_backward([datum(0)], "cross_entropy")
    await run.optim_step(STEP)
    await ended


def clients(at: Sequence[int]) -> Iterator[Point]:
    """Each with a connection and a run of its own, on which a step is always under way."""
    yield from anyio.run(_clients, at)


async def _clients(at: Sequence[int]) -> list[Point]:
    zmq.Context.instance().set(zmq.MAX_SOCKETS, 8 * max(at) + 100)
    points = list[Point]()
    async with served(replace(SETTINGS, slots=64)) as (deployment, _), AsyncExitStack() as stack:
        key, every = await deployment.create_key("clients"), list[lorry.TrainingClient]()
        for count in at:
            while len(every) < count:
                connection = lorry.connect(deployment.address, api_key=key, timeout_s=120)
                service = await stack.enter_async_context(connection)
                every.append(await service.create_lora_training_client_async("bench", rank=8, seed=len(every)))
            points.append(await _closed_loops(every))
    return points


async def _closed_loops(every: Sequence[lorry.TrainingClient]) -> Point:
    spent = list[float]()
    started = time.perf_counter()

    async def loop(run: lorry.TrainingClient) -> None:
        while time.perf_counter() - started <= SECONDS:
            sent = time.perf_counter()
            await _step(run)
            spent.append(time.perf_counter() - sent)

    async with anyio.create_task_group() as tasks:
        for run in every:
            tasks.start_soon(loop, run)
    seconds = time.perf_counter() - started
    cuts = statistics.quantiles(spent, n=100)
    found = {"steps/s": len(spent) / seconds, "p50 ms": 1e3 * cuts[49], "p99 ms": 1e3 * cuts[98]}
    return Point(len(every), found | {"tokens/s": TOKENS * len(spent) / seconds})
