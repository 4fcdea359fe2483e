"""What a base in 4 bits (`--quantize nf4`) takes of memory and of time.

The model of `bench.engine` from files: its linear layers' weights in float32 and in 4 bits; and training passes of
eight runs, in turns, over the 4-bit base through Lorry and through PEFT run after run, and over the plain one through
Lorry. Prints a table and a JSON line.
"""

import argparse
import json
import statistics
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from bench.engine import VOCAB, Lorry, Peft, Way, build_model, measure, ratios
from bench.goals import at_least, at_most, settle
from lorry.actors.model.loading import load_model
from lorry.actors.model.lora import layers_of
from lorry.actors.model.nf4 import nbytes_of
from lorry.wire.types import Quantization

MOST_OF_WEIGHTS = 0.131
"""An eighth, and the factors."""
LEAST_OVER_PEFT, MOST_OF_PLAIN = 1.5, 1.5


def weights_of_layers(way: Lorry) -> int:
    """Bytes of the layers that are quantised, which the output head is not."""
    base = way.engine.base
    head = base.model.get_output_embeddings()
    return sum(nbytes_of(layer.base) for layer in layers_of(base).values() if layer is not head)


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each run's row")
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="peft")
    with TemporaryDirectory() as folder:
        build_model().save_pretrained(folder)
        kinds: tuple[Quantization, Quantization] = ("none", "nf4")
        plain, four_bit = (Lorry(load_model(Path(folder), "float32", quantize=kind), options.runs) for kind in kinds)
        peft = Peft(load_model(Path(folder), "float32", quantize="nf4"), options.runs)
    ways: dict[str, Way] = {"lorry": four_bit, "peft": peft, "plain": plain}
    times = measure(ways, torch.randint(0, VOCAB, (options.runs, options.tokens + 1)), options.repetitions)
    medians = {name: statistics.median(values) for name, values in times.items()}
    over_peft, of_plain = ratios(times["peft"], times["lorry"]), ratios(times["lorry"], times["plain"])
    share = weights_of_layers(four_bit) / weights_of_layers(plain)
    table = Table("", "4 bits", "float32", "PEFT over 4 bits", title=f"{options.runs} runs of {options.tokens} tokens")
    weights = (f"{weights_of_layers(way) / 2**20:.1f} MiB" for way in (four_bit, plain))
    table.add_row("weights of linear layers", *weights, "")
    table.add_row("a training pass", *(f"{medians[name]:.0f} ms" for name in ("lorry", "plain", "peft")))
    Console().print(table)
    found = {"weights": share, "ms": medians, "peft_over_lorry": over_peft, "over_plain": of_plain}
    print(json.dumps({"bench": "quantised"} | found))
    missed = at_most("weights in 4 bits over float32", share, MOST_OF_WEIGHTS)
    missed += at_least("training over a 4-bit base, over PEFT", over_peft[0], LEAST_OVER_PEFT)
    return missed + at_most("training over a 4-bit base, of a plain one's time", of_plain[0], MOST_OF_PLAIN)


if __name__ == "__main__":
    settle(main())
