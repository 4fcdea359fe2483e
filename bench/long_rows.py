"""What a training pass over a long row holds, and takes, where some or all of its layers are computed again.

The model of `bench.engine`, one adapter on everything. Memory is what the process gained at most while the pass went
forward and back: as malloc comes, which keeps much of what was freed, and in processes of their own that give freed
blocks back, without and with compiled layers; beside it what was foreseen from the model's configuration alone. Prints
a table and a JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from bench.engine import VOCAB, build_model
from bench.goals import at_least, at_most, settle
from bench.images import memory_of_process, reset_peak
from lorry.actors.model.base_model import BaseModel, wrap_model
from lorry.actors.model.in_flight import Segment
from lorry.actors.model.lora import attach_lora
from lorry.actors.model.memory import give_back_freed
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.training.compiled_layers import CompiledLayers
from lorry.actors.training.foreseen import foresee_pass

MOST_TIME, LEAST_MEMORY = 1.6, 3.0
MOST_COMPILED = 0.8
MOST_OFF = 0.05
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Passes:
    """Over a row of so many tokens; `ways` are how many layers are computed again."""

    def __init__(self, tokens: int, *, compiled: bool = False) -> None:
        self.tokens = tokens
        self.base: BaseModel = wrap_model(build_model())
        targets = attach_lora(self.base)
        self._adapter = targets.new_adapter(AdapterSpec(8), self.base.device)
        if compiled:
            self.base.in_flight.layers = CompiledLayers(self.base, targets)
        self.ways = (0, self.base.layers // 2, self.base.layers)
        self.run(0, 256)

    def run(self, again: int, tokens: int | None = None) -> tuple[float, float]:
        """MiB that the process gained at most, and seconds."""
        tokens, in_flight = tokens or self.tokens, self.base.in_flight
        in_flight.segments = [Segment(self._adapter, 0, tokens)]
        in_flight.lengths, in_flight.again = [tokens], again
        row = torch.randint(0, VOCAB, (tokens,))
        give_back_freed()
        before, started = reset_peak(), time.perf_counter()
        hidden = self.base.hidden_states(row, torch.arange(tokens), grad=True)
        hidden.backward(torch.ones_like(hidden))
        seconds = time.perf_counter() - started
        return (memory_of_process("VmHWM") - before) / 1024, seconds


def measure_held(tokens: int, held: Literal["plain", "compiled"]) -> list[float]:
    """MiB of each way, in a process that gives freed blocks back."""
    command = [sys.executable, "-m", "bench.long_rows", "--tokens", str(tokens), "--held", held]
    ended = subprocess.run(command, env=os.environ | GIVES_BACK, capture_output=True, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="of the row")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--held", choices=("plain", "compiled"), help="print MiB alone, of each way")
    options = parser.parse_args(arguments)
    passes = Passes(options.tokens, compiled=options.held == "compiled")
    if options.held:
        print(json.dumps([passes.run(again)[0] for again in passes.ways]))
        return []
    held = dict(zip(passes.ways, measure_held(options.tokens, "plain"), strict=True))
    compiled = dict(zip(passes.ways, measure_held(options.tokens, "compiled"), strict=True))
    found = {again: list[tuple[float, float]]() for again in passes.ways}
    for _ in range(options.repetitions):
        for again, each in found.items():
            each.append(passes.run(again))
    cost = foresee_pass(passes.base.model.config, passes.base.dtype)
    foreseen = {again: cost.bytes([options.tokens], again) / 2**20 for again in passes.ways}
    columns = ("MiB as malloc comes", "MiB held", "foreseen", "held by compiled layers", "ms")
    table = Table("layers computed again", *columns, title=f"A row of {options.tokens:,} tokens")
    for again, each in found.items():
        ms = 1000 * statistics.median(seconds for _, seconds in each)
        numbers = (max(mib for mib, _ in each), held[again], foreseen[again], compiled[again], ms)
        table.add_row(f"{again} of {passes.base.layers}", *(f"{number:,.0f}" for number in numbers))
    Console().print(table)
    none, every = found[0], found[passes.base.layers]
    slower = statistics.median(b / a for (_, a), (_, b) in zip(none, every, strict=True))
    less = held[0] / held[passes.base.layers]
    off = max(abs(held[again] / foreseen[again] - 1) for again in passes.ways)
    share = compiled[0] / held[0]
    found_ratios = {"memory_ratio": less, "time_ratio": slower, "foreseen_off": off, "compiled_over_plain": share}
    print(json.dumps({"bench": "long_rows", **found_ratios}))
    missed = at_most("time with every layer computed again, over none", slower, MOST_TIME)
    missed += at_least("memory without, over every layer computed again", less, LEAST_MEMORY)
    missed += at_most("memory with compiled layers, over the model's own", share, MOST_COMPILED)
    return missed + at_most("memory, off what was foreseen", off, MOST_OFF)


if __name__ == "__main__":
    settle(main())
