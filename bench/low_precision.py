"""What bfloat16 gains over float32 on this machine, for training and for sampling, on the model of 41.6 M parameters.

In turns, in one process: a mixed pass of 16 runs of 256 tokens, and 16 sequences of 64 tokens behind 64 of 4 adapters,
as an actor with `--compile` computes them. Beside it what one large product gains. The goals are for processors that
multiply bfloat16; others are told so. Prints a table and a JSON line.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import engine, sampling
from bench.engine import VOCAB, build_model, measure, ratios, shown
from bench.goals import at_least, settle
from bench.limits import limits_of

GOAL = 1.6
RUNS, TOKENS = 16, 256
ADAPTERS, SEQUENCES = 4, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def multiplies_bfloat16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text().split() for flag in _FLAGS)


def training(repetitions: int, *, compiles: bool) -> tuple[float, float, float]:
    ways = {name: engine.Lorry(build_model(dtype), RUNS, compile_layers=compiles) for name, dtype in DTYPES.items()}
    times = measure(ways, torch.randint(0, VOCAB, (RUNS, TOKENS + 1)), repetitions)
    return ratios(times["float32"], times["bfloat16"])


def decoding(repetitions: int, *, compiles: bool) -> tuple[float, float, float]:
    prompts = torch.randint(1, VOCAB, (SEQUENCES, sampling.PROMPT))
    ways = {
        name: sampling.Lorry(build_model(dtype), compiles).prepare(prompts, ADAPTERS) for name, dtype in DTYPES.items()
    }
    turns = [{name: sampling.timed(run) for name, run in ways.items()} for _ in range(repetitions + 1)][1:]
    return ratios([turn["float32"] for turn in turns], [turn["bfloat16"] for turn in turns])


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="as an actor with --compile"
    )
    options = parser.parse_args(arguments)
    rates = [limits_of(torch.device("cpu"), dtype).operations_per_s for dtype in DTYPES.values()]
    found = {
        "training": training(options.repetitions, compiles=options.compile),
        "sampling": decoding(options.repetitions, compiles=options.compile),
    }
    title = f"bfloat16 over float32, {torch.get_num_threads()} threads; one large product: {rates[1] / rates[0]:.2f}"
    table = Table("what", "times as fast", "goal", title=title)
    for name, ratio in found.items():
        table.add_row(name, shown(ratio), str(GOAL))
    console = Console()
    console.print(table)
    print(json.dumps({"bench": "low_precision", "compiled": options.compile, "product": rates[1] / rates[0], **found}))
    if not multiplies_bfloat16():
        console.print("This processor does not multiply bfloat16: the goals are not its own.")
        return []
    return [line for name, ratio in found.items() for line in at_least(f"bfloat16 {name}", ratio[0], GOAL)]


if __name__ == "__main__":
    settle(main())
