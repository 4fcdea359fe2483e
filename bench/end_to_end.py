"""What client, broker, journal and supervision cost on top of the engine alone, for the same work.

Eight runs of ranks 8 to 32 on the 40 M parameter model of `bench/engine.py`, each with one row a round: (a) the engine
alone, in this process; (b) the same through client, ZeroMQ, SQLite and an actor process, the eight clients each waiting
for their result before they send the next. Rounds of (a) and (b) take turns. Prints a table and a JSON line; the goal
is for the first of the lengths.
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
from transformers import PreTrainedTokenizerFast

import lorry
from bench.engine import RANKS, VOCAB, Lorry, build_model, datum, ratios
from bench.goals import at_most, settle
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import serving

GOAL = 1.15
BASE_TOKENIZER = Path(__file__).resolve().parent.parent / "tests/assets/base-model"


@dataclass(frozen=True, slots=True)
class Result:
    """Milliseconds a round, and the median and quartiles of the ratio."""

    tokens: int
    alone_ms: float
    served_ms: float
    served_over_alone: tuple[float, float, float]


def save_model(folder: Path) -> None:
    model = build_model()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(BASE_TOKENIZER).save_pretrained(folder)


async def measure(folder: Path, data: Path, runs: int, lengths: list[int], rounds: int) -> list[Result]:
    engine = Lorry(build_model(), runs)
    config = ServeConfig((ModelConfig("bench", str(folder)),), data, bind="tcp://127.0.0.1:*", log_level="warning")
    async with serving(config) as deployment:
        key = await deployment.create_key("bench")
        async with lorry.connect(deployment.address, api_key=key) as service:
            clients = [
                await service.create_lora_training_client_async("bench", rank=RANKS[i % 3], seed=i) for i in range(runs)
            ]
            return [await measure_length(engine, clients, length, rounds) for length in lengths]


async def measure_length(engine: Lorry, clients: list[lorry.TrainingClient], length: int, rounds: int) -> Result:
    rows = torch.randint(0, VOCAB, (len(clients), length + 1))
    alone = engine.prepare(rows)
    data = [[datum(row)] for row in rows]
    stretch = 5  # rounds in a row, so that a turn of (b) is what it is in the middle of a training loop
    times: dict[str, list[float]] = {"alone": [], "served": []}
    for turn in range(rounds // stretch + 1):
        started = time.perf_counter()
        for _ in range(stretch):
            alone()
        halfway = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for client, batch in zip(clients, data, strict=True):
                tasks.start_soon(train, client, batch, stretch)
        if turn > 0:  # the first warms up
            times["alone"].append((halfway - started) / stretch * 1e3)
            times["served"].append((time.perf_counter() - halfway) / stretch * 1e3)
    alone_ms, served_ms = (statistics.median(times[name]) for name in ("alone", "served"))
    return Result(length, alone_ms, served_ms, ratios(times["served"], times["alone"]))


async def train(client: lorry.TrainingClient, batch: list[lorry.Datum], rounds: int) -> None:
    for _ in range(rounds):
        await client.forward_backward(batch, "cross_entropy")


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128], help="tokens per row")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(folder)
        results = anyio.run(measure, folder, Path(temporary) / "data", options.runs, options.lengths, options.rounds)
    title = f"{options.runs} runs of one row, {torch.get_num_threads()} threads"
    table = Table("tokens per row", "engine alone ms", "served ms", "served / alone", title=title)
    for result in results:
        middle, low, high = result.served_over_alone
        times = (f"{ms:.1f}" for ms in (result.alone_ms, result.served_ms))
        table.add_row(str(result.tokens), *times, f"{middle:.2f} ({low:.2f} to {high:.2f})")
    Console().print(table)
    print(json.dumps({"bench": "end_to_end", "runs": options.runs, "results": [asdict(result) for result in results]}))
    return at_most("served over the engine alone", results[0].served_over_alone[0], GOAL)


if __name__ == "__main__":
    settle(main())
