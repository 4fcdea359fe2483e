"""What a flood of one tenant costs another: `--requests` of one wait, while the other's loop, a pass and a step at a
time, goes on; and how evenly two floods are served.

The demo's model with one thread, rows of 32 tokens, rank 8, through client, broker and actor. Prints how long a round
of the loop takes alone and beside the flood, and what lies between, in micro-batches of the flood; Jain's index of what
two floods had been served when the heavier's was over, of a tenant of weight 1 and of one of weight `--weight`, each
divided by its weight; and a JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import torch
from rich.console import Console
from rich.table import Table

import lorry
from bench.goals import at_least, at_most, settle
from lorry.actors.config import ActorSettings
from lorry.administration import administer
from lorry.bench.figures import jain_index
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import Deployment, serving
from lorry.service import Service
from lorry.wire.admin_messages import SetTenant
from lorry.wire.ids import TenantId

MODEL, BUDGET, TOKENS = Path("tests/assets/base-model"), 2048, 32
MICRO_BATCHES = 3.0
"""When a request comes, one runs, and one waits at the actor already; in the next one it is, among others."""
JAIN = 0.98


@dataclass(frozen=True, slots=True)
class Found:
    alone_ms: float
    beside_ms: float
    micro_batch_ms: float
    jain: float

    @property
    def micro_batches(self) -> float:
        return (self.beside_ms - self.alone_ms) / self.micro_batch_ms


async def measure(data: Path, requests: int, rounds: int, weight: float) -> Found:
    actor = ActorSettings(threads=1, token_budget=BUDGET)
    config = ServeConfig((ModelConfig("m", str(MODEL)),), data, "tcp://127.0.0.1:*", actor=actor, log_level="warning")
    async with serving(config) as deployment:
        keys = [await deployment.create_key(tenant) for tenant in ("flood", "loop")]
        async with (
            lorry.connect(deployment.address, api_key=keys[0]) as first,
            lorry.connect(deployment.address, api_key=keys[1]) as second,
        ):
            flood, loop = [await each.create_lora_training_client_async("m", rank=8) for each in (first, second)]
            await spent(loop, rounds)
            alone = await spent(loop, rounds)
            waiting = queued(flood, requests)
            await waiting[0]
            beside = await spent(loop, rounds)
            micro_batch_ms = 1e3 * await micro_batch_s(waiting)
            jain = await shared(deployment, (flood, loop), requests // 4, weight)
        return Found(statistics.median(alone), statistics.median(beside), micro_batch_ms, jain)


def queued(run: lorry.TrainingClient, requests: int) -> list[lorry.Future[lorry.ForwardBackwardOutput]]:
    return [run.forward_backward([a_row()], "cross_entropy") for _ in range(requests)]


async def spent(run: lorry.TrainingClient, rounds: int) -> list[float]:
    """Milliseconds of each round."""
    found: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        backward = run.forward_backward([a_row()], "cross_entropy")
        await run.optim_step(lorry.AdamParams(learning_rate=1e-4))
        await backward
        found.append(1e3 * (time.perf_counter() - started))
    return found


async def micro_batch_s(waiting: list[lorry.Future[lorry.ForwardBackwardOutput]]) -> float:
    """Of what is left of the flood, which nobody else disturbs."""
    left = [future for future in waiting if not future.done()]
    await left[0]
    started = time.perf_counter()
    await left[-1]
    return (time.perf_counter() - started) / (len(left) * TOKENS / BUDGET)


async def shared(
    deployment: Deployment, runs: tuple[lorry.TrainingClient, lorry.TrainingClient], requests: int, weight: float
) -> float:
    service = Service(deployment.address, deployment.server_key, deployment.data)
    await administer(service, SetTenant(TenantId("loop"), weight), type(None))
    floods = [queued(run, requests) for run in runs]
    await floods[1][-1]  # of the heavier one
    served = [sum(future.done() for future in flood) for flood in floods]
    for flood in floods:
        await flood[-1]
    index = jain_index([served[0], served[1] / weight])
    assert index is not None
    return index


def a_row() -> lorry.Datum:
    tokens = torch.randint(0, 1000, (TOKENS + 1,)).tolist()
    targets = lorry.TensorData(tokens[1:], "int64", [TOKENS])
    return lorry.Datum(lorry.ModelInput.from_ints(tokens[:-1]), {"target_tokens": targets})


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--weight", type=float, default=2.0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as data:
        found = anyio.run(measure, Path(data), options.requests, options.rounds, options.weight)
    table = Table("", "found", "goal", title=f"a flood of {options.requests:,} requests")
    table.add_row("a round of the loop alone, ms", f"{found.alone_ms:.0f}", "")
    table.add_row("beside the flood, ms", f"{found.beside_ms:.0f}", "")
    table.add_row("a micro-batch of the flood, ms", f"{found.micro_batch_ms:.0f}", "")
    table.add_row("what lies between, in micro-batches", f"{found.micro_batches:.2f}", f"{MICRO_BATCHES:g} at most")
    table.add_row(
        f"Jain's index of two floods, weights 1 and {options.weight:g}", f"{found.jain:.4f}", f"{JAIN} at least"
    )
    Console().print(table)
    print(json.dumps({"bench": "flood", "micro_batches": found.micro_batches} | asdict(found)))
    missed = at_most("micro-batches that a round waits beside a flood", found.micro_batches, MICRO_BATCHES)
    return missed + at_least("Jain's index of two floods", found.jain, JAIN)


if __name__ == "__main__":
    settle(main())
