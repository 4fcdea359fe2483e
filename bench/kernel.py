"""What the kernel for LoRA does for decode steps that are not compiled: their time with it over their time without.

Both decoders take turns in one process, on the model of 41.6 M parameters; 64-token prompts, 64 new tokens. Prints a
table and a JSON line.
"""

import argparse
import copy
import json
import statistics

import torch
from rich.console import Console
from rich.table import Table

from bench.engine import VOCAB, build_model, ratios, shown
from bench.sampling import CHUNK, PROMPT, SHAPES, Letters, Lorry
from lorry.actors.model.base_model import wrap_model
from lorry.actors.sampling.decoder import Decoder
from lorry.actors.sampling.lora.kernel import has_kernel


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args(arguments)
    model = build_model()
    if not has_kernel(wrap_model(copy.deepcopy(model))):
        raise SystemExit("there is no kernel to measure: no compiler was found, or it cannot build it")
    sides = {"with": Lorry(copy.deepcopy(model), False), "without": Lorry(model, False)}
    sides["without"].decoder = Decoder(sides["without"].base, Letters(), 64, CHUNK, 2**30)
    prompts = torch.randint(1, VOCAB, (16, PROMPT))
    title = f"decode steps, {torch.get_num_threads()} threads"
    table = Table("adapters x sequences", "ms with the kernel", "ms without", "with over without", title=title)
    results = list[dict[str, object]]()
    for adapters, each in SHAPES:
        steps = {name: list[float]() for name in sides}
        for _ in range(options.repetitions + 1):
            for name, side in sides.items():
                side.step_s.clear()
                side.prepare(prompts, adapters)()
                steps[name].append(1e3 * statistics.median(side.step_s))
        ms = {name: values[1:] for name, values in steps.items()}  # the first warms up
        medians = {name: statistics.median(values) for name, values in ms.items()}
        ratio = ratios(ms["with"], ms["without"])
        table.add_row(f"{adapters} x {each}", *(f"{value:.1f}" for value in medians.values()), shown(ratio))
        results.append({"adapters": adapters, "sequences": each, "ms": medians, "with_over_without": ratio})
    Console().print(table)
    print(json.dumps({"bench": "kernel", "results": results}))


if __name__ == "__main__":
    main()
