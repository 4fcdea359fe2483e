"""What more replicas give one run whose passes are large: tokens a second over one replica's.

Each replica is an actor process with one thread, so that a machine of two cores can show what two of them give, and
what a third costs where there is no core for it. A deployment each of one, two and three replicas take turns; all but
the first divide every pass (`--spread-after-s 0`). A pass is `forward_backward` of many rows, with a step behind it.

Prints a table and a JSON line.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

import lorry
from bench.engine import ratios
from bench.goals import at_least, settle
from bench.recovery import BASE_MODEL
from lorry.actors.config import ActorSettings
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import serving

STEP = lorry.AdamParams(learning_rate=1e-4)
REPLICAS = (1, 2, 3)
BUDGET = 1024
"""Tokens that go through the model at a time, however many a part has: larger passes are slower on these cores."""


def make_model(folder: Path) -> int:
    """A Qwen3 of random weights with the demo's tokenizer; returns its parameters."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def data_of(rows: int, tokens: int) -> list[lorry.Datum]:
    texts = [[(seed * 7 + 13 * i) % 2000 for i in range(tokens + 1)] for seed in range(rows)]
    return [
        lorry.Datum(lorry.ModelInput.from_ints(text[:-1]), {"target_tokens": lorry.TensorData(text[1:])})
        for text in texts
    ]


async def learn(training: lorry.TrainingClient, data: list[lorry.Datum]) -> tuple[float, float]:
    """The seconds of a pass and its step, and the loss."""
    started = time.perf_counter()
    forward_backward = training.forward_backward(data, "cross_entropy")
    await training.optim_step(STEP)
    return time.perf_counter() - started, (await forward_backward).metrics["loss:sum"]


async def measured(model: Path, data: list[lorry.Datum], rank: int, turns: int) -> list[list[tuple[float, float]]]:
    found: list[list[tuple[float, float]]] = [[] for _ in REPLICAS]
    async with AsyncExitStack() as stack:
        runs: list[lorry.TrainingClient] = []
        for replicas in REPLICAS:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lorry-bench-"))
            config = ServeConfig(
                (ModelConfig("bench", str(model)),),
                Path(folder),
                bind="tcp://127.0.0.1:*",
                replicas=replicas,
                actor=ActorSettings(threads=1, token_budget=BUDGET),
                log_level="error",
                spread_after_s=0,
            )
            deployment = await stack.enter_async_context(serving(config))
            key = await deployment.create_key("bench")
            service = await stack.enter_async_context(lorry.connect(deployment.address, api_key=key, timeout_s=60))
            runs.append(await service.create_lora_training_client_async("bench", rank=rank, seed=1))
        for turn in range(turns + 1):
            for run, side in zip(runs, found, strict=True):
                one = await learn(run, data)
                side += [one] if turn else []  # the first warms up
    return found


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256, help="in a row")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lorry-bench-") as folder:
        parameters = make_model(Path(folder))
        data = data_of(options.rows, options.tokens)
        found = anyio.run(measured, Path(folder), data, options.rank, options.turns)
    tokens = options.rows * options.tokens
    seconds = [[took for took, _ in side] for side in found]
    title = (
        f"{parameters / 1e6:.1f} M parameters, passes of {tokens:,} tokens, rank {options.rank}, {os.cpu_count()} cores"
    )
    table = Table("replicas of one thread", "seconds a pass", "tokens a second", "over one replica", title=title)
    over = [ratios(seconds[0], side) for side in seconds]
    for replicas, side, (middle, low, high) in zip(REPLICAS, seconds, over, strict=True):
        took = statistics.median(side)
        table.add_row(str(replicas), f"{took:.2f}", f"{tokens / took:,.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})")
    Console(width=120).print(table)
    losses = [[loss for _, loss in side] for side in found]
    apart = max(abs(a - b) / abs(b) for side in losses[1:] for a, b in zip(side, losses[0], strict=True))
    print(f"losses of the same steps differ by {apart:.1e} of their value at the most")
    print(json.dumps({"bench": "replicas", "cores": os.cpu_count(), "seconds": seconds, "losses_apart": apart}))
    return at_least("tokens a second of two replicas over one", over[1][0], 1.5)


if __name__ == "__main__":
    settle(main())
