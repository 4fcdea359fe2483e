"""How two base models share one device by their weights: both are flooded, and what each has done is compared.

The demo's model under two names, all processes on one core, rows of 32 tokens, rank 8. Prints the tokens that each has
trained in `--seconds`, with equal weights and with `--weight` against 1, and their ratio; and a JSON line.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import anyio
from rich.console import Console
from rich.table import Table

import lorry
from bench.flood import MODEL, TOKENS, queued
from bench.goals import at_least, at_most, settle
from lorry.actors.config import ActorSettings
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import serving

TOLERANCE = 0.25
"""Of the ratio that the weights say."""


async def measure(data: Path, weight: float, seconds: float) -> tuple[int, int]:
    """Tokens of the model of this weight, and of the one of weight 1."""
    names = ("a", "b")
    config = ServeConfig(
        tuple(ModelConfig(name, str(MODEL)) for name in names),
        data,
        "tcp://127.0.0.1:*",
        actor=ActorSettings(threads=1, token_budget=256),
        log_level="warning",
        model_weights={"a": weight, "b": 1.0},
    )
    async with serving(config) as deployment:
        key = await deployment.create_key("lab")
        async with lorry.connect(deployment.address, api_key=key) as service:
            runs = [await service.create_lora_training_client_async(name, rank=8) for name in names]
            floods = [queued(run, 9_000) for run in runs]
            for flood in floods:
                await flood[50]
            before = [done(flood) for flood in floods]
            await anyio.sleep(seconds)
            first, second = (done(flood) - was for flood, was in zip(floods, before, strict=True))
            return first * TOKENS, second * TOKENS


def done(flood: list[lorry.Future[lorry.ForwardBackwardOutput]]) -> int:
    return sum(future.done() for future in flood)


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    table, missed = Table("weights", "tokens of each", "ratio", title="two models on one core"), list[str]()
    for weight in (1.0, options.weight):
        with tempfile.TemporaryDirectory() as data:
            first, second = anyio.run(measure, Path(data), weight, options.seconds)
        ratio = first / second
        table.add_row(f"{weight:g} and 1", f"{first:,} and {second:,}", f"{ratio:.2f}")
        print(json.dumps({"bench": "models", "weight": weight, "tokens": [first, second], "ratio": ratio}))
        missed += at_least(f"the share of weight {weight:g}", ratio, weight * (1 - TOLERANCE))
        missed += at_most(f"the share of weight {weight:g}", ratio, weight * (1 + TOLERANCE))
    Console().print(table)
    return missed


if __name__ == "__main__":
    settle(main())
