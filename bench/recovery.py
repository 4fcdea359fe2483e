"""What it costs that nothing is lost: snapshots under way, a run that comes back after its actor was killed, cold runs.

On the demo's model, through client, broker and an actor process.

(a) Training with snapshots over training without, in tokens a second; the two take turns.
(b) A long run without any `save_state`, whose actor is killed again and again. The pause is from its death to the run's
    next result; a process needs the same time to start where there is nothing to repeat. Its losses are to be those of
    a run that was left alone, bit for bit.
(c) Many runs, few of them active, in a budget of host memory, beside an actor that holds as many runs as it has slots
    and trains them in the same passes: what the first takes beyond the second without its runs, and its tokens a second
    over the second's.

Prints tables and a JSON line.
"""

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import anyio
import psutil
from rich.console import Console
from rich.table import Table

import lorry
from bench.engine import ratios
from bench.goals import at_least, at_most, settle
from lorry.actors.config import ActorSettings
from lorry.actors.model.base_model import load_base_model
from lorry.actors.model.lora import attach_lora
from lorry.actors.model.spec import AdapterSpec
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import Deployment, serving

BASE_MODEL = Path(__file__).resolve().parent.parent / "tests/assets/base-model"
SETTINGS = ActorSettings(threads=1)
STEP = lorry.AdamParams(learning_rate=1e-4)
TOKENS, RANK, AHEAD = 32, 8, 4
PARTS = ("cost", "killed", "cold")
MIB = 2**20


def datum(seed: int) -> lorry.Datum:
    tokens = [(seed * 7 + 13 * i) % 2000 for i in range(TOKENS + 1)]
    return lorry.Datum(lorry.ModelInput.from_ints(tokens[:-1]), {"target_tokens": lorry.TensorData(tokens[1:])})


@asynccontextmanager
async def served(settings: ActorSettings) -> AsyncGenerator[tuple[Deployment, lorry.ServiceClient]]:
    with tempfile.TemporaryDirectory(prefix="lorry-bench-") as data:
        model = ModelConfig("bench", str(BASE_MODEL))
        config = ServeConfig((model,), Path(data), bind="tcp://127.0.0.1:*", actor=settings, log_level="error")
        async with serving(config) as deployment:
            key = await deployment.create_key("bench")
            async with lorry.connect(deployment.address, api_key=key, timeout_s=60) as service:
                yield deployment, service


def actor_of(deployment: Deployment) -> psutil.Process:
    (child,) = [child for child in deployment.children if child.name.startswith("bench#")]
    assert child.process is not None
    return psutil.Process(child.process.pid)


async def new_runs(service: lorry.ServiceClient, count: int) -> list[lorry.TrainingClient]:
    return [await service.create_lora_training_client_async("bench", rank=RANK, seed=seed) for seed in range(count)]


async def learn(training: lorry.TrainingClient, steps: int, first: int = 0) -> list[float]:
    """Their losses. A few steps are always on their way."""
    losses, ahead = list[float](), list[lorry.Future[lorry.ForwardBackwardOutput]]()
    for step in range(first, first + steps):
        ahead.append(training.forward_backward([datum(step)], "cross_entropy"))
        training.optim_step(STEP)
        if len(ahead) > AHEAD:
            losses.append((await ahead.pop(0)).metrics["loss:sum"])
    return losses + [(await future).metrics["loss:sum"] for future in ahead]


async def tokens_per_s(runs: Sequence[lorry.TrainingClient], seconds: float) -> float:
    """Of all of them in loops of their own."""
    steps = 0

    async def loop(training: lorry.TrainingClient) -> None:
        nonlocal steps
        while time.perf_counter() < until:
            await training.forward_backward([datum(steps)], "cross_entropy")
            await training.optim_step(STEP)
            steps += 1

    started = time.perf_counter()
    until = started + seconds
    async with anyio.create_task_group() as tasks:
        for run in runs:
            tasks.start_soon(loop, run)
    return steps * TOKENS / (time.perf_counter() - started)


async def cost(runs: int, seconds: float, turns: int) -> dict[str, Any]:
    never = replace(SETTINGS, recovery_s=inf, idle_save_s=inf)
    async with served(SETTINGS) as (_, saving), served(never) as (_, plain):
        sides = [await new_runs(service, runs) for service in (saving, plain)]
        rates = list[float](), list[float]()
        for turn in range(turns + 1):
            for side, found in zip(sides, rates, strict=True):
                rate = await tokens_per_s(side, seconds)
                found += [rate] if turn else []  # the first warms up
    return {"tokens_per_s": [statistics.median(side) for side in rates], "with_over_without": ratios(*rates)}


async def killed(deployment: Deployment, training: lorry.TrainingClient, step: int) -> tuple[float, float]:
    """The seconds from the death of its actor to the next result, and that."""
    os.kill(actor_of(deployment).pid, signal.SIGKILL)
    started = time.perf_counter()
    (loss,) = await learn(training, 1, step)
    return time.perf_counter() - started, loss


async def long_run(steps: int, kills: int) -> dict[str, Any]:
    async with served(SETTINGS) as (deployment, service):
        alone, training, idle = await new_runs(service, 1), await new_runs(service, 1), await new_runs(service, 1)
        start_s, _ = await killed(deployment, idle[0], 0)
        expected = await learn(alone[0], steps)
        losses, pauses, each = list[float](), list[float](), steps // kills
        for _ in range(kills):
            losses += await learn(training[0], each - 1, len(losses))
            pause_s, loss = await killed(deployment, training[0], len(losses))
            losses.append(loss)
            pauses.append(pause_s)
    same = losses == expected[: len(losses)]
    return {"steps": len(losses), "kills": kills, "start_s": start_s, "pauses_s": pauses, "bit_identical": same}


def bytes_of_a_run() -> int:
    targets = attach_lora(load_base_model(str(BASE_MODEL), "cpu", "float32"))
    return targets.new_adapter(AdapterSpec(rank=RANK), "cpu").nbytes


async def cold(registered: int, active: int, slots: int, budget: int, seconds: float, turns: int) -> dict[str, Any]:
    settings = replace(SETTINGS, slots=slots, host_memory=budget)
    async with served(settings) as (tight, service), served(replace(SETTINGS, slots=slots)) as (wide, ample):
        few = await new_runs(ample, slots)
        many = await new_runs(service, registered)
        for run in many:
            await learn(run, 1)
        rates, resident = (list[float](), list[float]()), list[int]()
        for turn in range(turns + 1):
            for side, found in zip((many[:active], few), rates, strict=True):
                rate = await tokens_per_s(side, seconds)
                found += [rate] if turn else []
            resident.append(actor_of(tight).memory_info().rss)
        without_runs = actor_of(wide).memory_info().rss - slots * bytes_of_a_run()
    return {
        "budget_mib": budget / MIB,
        "runs_mib": (max(resident) - without_runs) / MIB,
        "tokens_per_s": [statistics.median(side) for side in rates],
        "many_over_few": ratios(*rates),
    }


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--active", type=int, default=50)
    parser.add_argument("--budget-mib", type=int, default=256)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(arguments)
    table = Table("what", "found", "goal", title=f"the demo's model, {SETTINGS.threads} thread")
    found: dict[str, Any] = {"bench": "recovery"}
    missed: list[str] = []

    if "cost" in options.parts:
        found["cost"] = saved = anyio.run(cost, 8, options.seconds, options.turns)
        middle, low, high = saved["with_over_without"]
        table.add_row("training with snapshots over without", f"{middle:.3f} ({low:.3f} to {high:.3f})", "0.97")
        missed += at_least("training with snapshots over without", middle, 0.97)

    if "killed" in options.parts:
        found["long_run"] = run = anyio.run(long_run, options.steps, options.kills)
        bound = run["start_s"] + SETTINGS.recovery_s
        table.add_row(f"a start with nothing to repeat, after {run['steps']:,} steps", f"{run['start_s']:.1f} s", "")
        table.add_row(f"longest of {run['kills']} pauses", f"{max(run['pauses_s']):.1f} s", f"{bound:.1f} s")
        table.add_row("losses bit for bit those of a run left alone", str(run["bit_identical"]), "True")
        missed += at_most("longest pause", max(run["pauses_s"]), bound)
        missed += at_least("losses bit for bit those of a run left alone", float(run["bit_identical"]), 1)

    if "cold" in options.parts:
        budget = options.budget_mib * MIB
        sizes = options.registered, options.active, 8
        found["cold"] = runs = anyio.run(cold, *sizes, budget, options.seconds, options.turns)
        middle, low, high = runs["many_over_few"]
        name = f"{options.registered:,} runs, {options.active} active, 8 slots"
        table.add_row(f"{name}: host memory", f"{runs['runs_mib']:.0f} MiB", f"{options.budget_mib} MiB")
        table.add_row("their tokens a second over 8 runs'", f"{middle:.2f} ({low:.2f} to {high:.2f})", "0.9")
        missed += at_most("host memory of many runs, in MiB", runs["runs_mib"], options.budget_mib)
        missed += at_least("tokens a second of many runs over those of 8", middle, 0.9)
    Console().print(table)
    print(json.dumps(found))
    return missed


if __name__ == "__main__":
    settle(main())
