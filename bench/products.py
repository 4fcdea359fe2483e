"""The float32 products of the benchmark's model through oneDNN, as the actor makes them, over torch's own.

Forward `x W.T` and backward `dy W` of one layer's shapes and of the output head, in turns. Prints a table and a JSON
line: GFLOP/s of each, and the median ratio of neighbouring repetitions.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.engine import VOCAB, ratios
from lorry.actors.model.products import linear, linear_backward

SHAPES = {"attention": (512, 512), "up": (512, 1536), "down": (1536, 512), "output head": (512, VOCAB)}
"""(inputs, outputs) of the layers of `bench.engine.build_model`."""


def time_once(product: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    product()
    return time.perf_counter() - started


def compare(rows: int, inputs: int, outputs: int, *, backward: bool, repetitions: int) -> tuple[float, float, float]:
    """GFLOP/s of torch's own product and of the actor's, and how many times as fast the second is."""
    weight = torch.randn(outputs, inputs)
    x = torch.randn(rows, outputs if backward else inputs)
    plain = (lambda: torch.mm(x, weight)) if backward else (lambda: torch.mm(x, weight.T))
    ours = (lambda: linear_backward(x, weight)) if backward else (lambda: linear(x, weight))
    torch.testing.assert_close(plain(), ours(), rtol=1e-3, atol=1e-3)
    pairs = [(time_once(plain), time_once(ours)) for _ in range(repetitions)]
    times = [[pair[i] for pair in pairs] for i in (0, 1)]
    speeds = [2e-9 * rows * inputs * outputs / statistics.median(values) for values in times]
    return speeds[0], speeds[1], ratios(*times)[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 256, 1024], help="tokens in the packed row")
    parser.add_argument("--repetitions", type=int, default=25)
    options = parser.parse_args(arguments)
    title = f"GFLOP/s, float32, {torch.get_num_threads()} threads"
    table = Table("layer", "rows", "pass", "torch", "oneDNN", "ratio", title=title)
    results: list[dict[str, object]] = []
    for name, (inputs, outputs) in SHAPES.items():
        for rows in options.rows:
            for backward in (False, True):
                shape = (rows, inputs, outputs)
                plain, ours, ratio = compare(*shape, backward=backward, repetitions=options.repetitions)
                way = "backward" if backward else "forward"
                table.add_row(name, str(rows), way, f"{plain:.0f}", f"{ours:.0f}", f"{ratio:.2f}")
                results.append({"layer": name, "rows": rows, "pass": way, "torch": plain, "onednn": ours})
    Console().print(table)
    print(json.dumps({"bench": "products", "gflops": results}))


if __name__ == "__main__":
    main()
