"""How much longer an actor takes to start for what it compiles: the first one on a machine, and those after it.

Each in a process of its own, on the model of 41.6 M parameters: the kernel for LoRA, and for `--compile` the graphs of
the decoder and of the layers, with empty caches and with what the first one left. Prints a table and a JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from bench.goals import at_most, settle

GOAL_S = 2.0
"""Of all together, where caches are full."""
PARTS = ("the kernel for LoRA", "the decoder's graph", "the layers' graphs")


def measure_here() -> None:
    """Prints the seconds of each part as a line of JSON."""
    from bench.engine import build_model
    from bench.sampling import timed
    from lorry.actors.model.base_model import wrap_model
    from lorry.actors.model.lora import attach_lora
    from lorry.actors.sampling.compiled import CompiledModel
    from lorry.actors.sampling.lora.kernel import load_kernel
    from lorry.actors.training.compiled_layers import CompiledLayers

    base = wrap_model(build_model())
    targets = attach_lora(base)
    parts: tuple[Callable[[], object], ...] = (
        load_kernel,
        lambda: CompiledModel(base),
        lambda: CompiledLayers(base, targets),
    )
    print(json.dumps([timed(part) for part in parts]))


def start(cache: str) -> list[float]:
    environment = os.environ | {"XDG_CACHE_HOME": cache, "HOME": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
    command = [sys.executable, "-m", "bench.starting", "--here"]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args(arguments).here:
        measure_here()
        return []
    with tempfile.TemporaryDirectory() as cache:
        first, *later = (start(cache) for _ in range(3))
    table = Table("seconds", "the first on a machine", "later ones", title="41.6 M parameters")
    for part, once, again in zip(PARTS, first, zip(*later, strict=True), strict=True):
        table.add_row(part, f"{once:.2f}", ", ".join(f"{seconds:.2f}" for seconds in again))
    Console().print(table)
    print(json.dumps({"bench": "starting", "parts": PARTS, "first": first, "later": later}))
    return at_most("seconds that a later start takes for what it compiles", min(map(sum, later)), GOAL_S)


if __name__ == "__main__":
    settle(main())
