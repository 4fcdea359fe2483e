"""Where the time of a training pass or of a decode step goes, by torch's profiler, on the model of 41.6 M parameters.

`training`: eight runs with a row of 32 tokens. `sampling`: sixteen sequences over `--adapters`, four of them or as many
as are said. As an actor computes them, with `--compile` or without. Prints each operator's own time.
"""

import argparse
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bench import engine, sampling
from bench.engine import VOCAB, build_model
from lorry.wire.commands import SampleInput
from lorry.wire.model_input import ModelInput
from lorry.wire.types import SamplingParams

WARM_UP, TIMES, ROWS = 8, 20, 18


def training(dtype: torch.dtype, *, compiles: bool) -> Callable[[], object]:
    lorry = engine.Lorry(build_model(dtype), 8, compile_layers=compiles)
    return lorry.prepare(torch.randint(0, VOCAB, (8, 33)))


def decoding(dtype: torch.dtype, adapters: int, *, compiles: bool) -> Callable[[], object]:
    lorry, chosen = sampling.Lorry(build_model(dtype), compiles), sampling.choose(adapters)
    params = SamplingParams(max_tokens=WARM_UP + TIMES + 8, stop=[], seed=0)
    for i, prompt in enumerate(torch.randint(1, VOCAB, (16, sampling.PROMPT)).tolist()):
        lorry.decoder.add(
            i, SampleInput(ModelInput.from_ints(prompt), 1, params), lorry.adapters[chosen[i % adapters]], i
        )
    return lorry.decoder.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("training", "sampling"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--adapters", type=int, choices=(1, 4, 16), default=4, help="of the sequences")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.what == "training":
        run = training(dtype, compiles=options.compile)
    else:
        run = decoding(dtype, options.adapters, compiles=options.compile)
    for _ in range(WARM_UP):
        run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(TIMES):
            run()
    events: list[Any] = sorted(profiled.key_averages(), key=attrgetter("self_cpu_time_total"), reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    table = Table("operator", "% of the time", "ms each time", "calls", title=f"{total / 1e3 / TIMES:.1f} ms each time")
    for event in events[:ROWS]:
        own = event.self_cpu_time_total
        table.add_row(event.key[:60], f"{own / total:.1%}", f"{own / 1e3 / TIMES:.2f}", f"{event.count / TIMES:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
