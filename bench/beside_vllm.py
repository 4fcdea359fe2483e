"""How fast Lorry samples beside vLLM on the same CPU: 16 sequences of 64 tokens behind 64, over 4 adapters, in float32.

Lorry's decoder and vLLM take turns, each in a process of its own with all cores bound; adapters are those that Lorry
saved. vLLM is the one that `make vllm` installs. Prints a table and a JSON line.
"""

import argparse
import copy
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.engine import VOCAB, build_model, ratios, shown
from bench.goals import at_least, settle
from bench.sampling import NEW, PROMPT, Lorry, timed
from lorry.actors.adapters.checkpoints import save_sampler_weights

ROOT = Path(__file__).parent.parent
VLLM = ROOT / "build/vllm/bin/python"
ADAPTERS, SEQUENCES = 4, 16
GOAL = 5.5


@contextmanager
def vllm(python: Path, model: Path, adapters: list[Path], prompts: list[list[int]]) -> Generator[Callable[[], float]]:
    """What it yields has vLLM sample once, and returns the seconds."""
    command = [python, ROOT / "bench/vllm_side.py", model, str(NEW), *adapters]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # pyright: ignore[reportCallIssue, reportArgumentType]
        assert process.stdin is not None and process.stdout is not None
        while process.stdout.readline() != "ready\n":  # it says other things before
            if process.poll() is not None:
                raise RuntimeError("vLLM ended before it was ready; its error is above")

        def sample() -> float:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(prompts) + "\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        try:
            yield sample
        finally:
            process.kill()


def measure(python: Path, folder: Path, turns: int, *, compile_steps: bool) -> tuple[list[float], list[float]]:
    """Seconds of each turn of Lorry's and of vLLM's."""
    model = build_model()
    model.save_pretrained(folder / "model")
    lorry = Lorry(copy.deepcopy(model), compile_steps)
    adapters = [folder / f"adapter-{i}" for i in range(ADAPTERS)]
    for adapter, place in zip(lorry.adapters, adapters, strict=False):
        save_sampler_weights(adapter, lorry.targets, place, "bench")
    prompts = torch.randint(1, VOCAB, (SEQUENCES, PROMPT))
    ours = lorry.prepare(prompts, ADAPTERS)
    with vllm(python, folder / "model", adapters, prompts.tolist()) as theirs:
        pairs = [(timed(ours), theirs()) for _ in range(turns + 1)][1:]  # the first warms up
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", type=Path, default=VLLM, help="a Python that has it")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="as an actor with --compile"
    )
    options = parser.parse_args(arguments)
    console = Console(markup=False)
    if not options.vllm.exists():
        console.print(f"not measured beside vLLM: there is no {options.vllm}; `make vllm` makes one", soft_wrap=True)
        return []
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = measure(options.vllm, Path(folder), options.turns, compile_steps=options.compile)
    rates = [SEQUENCES * NEW / statistics.median(side) for side in (ours, theirs)]
    ratio = ratios(theirs, ours)
    title = f"{SEQUENCES} x {NEW} tokens over {ADAPTERS} adapters, 41.6 M parameters, {torch.get_num_threads()} threads"
    table = Table("lorry tokens/s", "vLLM tokens/s", "over vLLM", "goal", title=title)
    table.add_row(*(f"{rate:.0f}" for rate in rates), shown(ratio), str(GOAL))
    console.print(table)
    print(json.dumps({"bench": "beside_vllm", "compiled": options.compile, "tokens_per_s": rates, "ratio": ratio}))
    return at_least("sampling beside vLLM", ratio[0], GOAL)


if __name__ == "__main__":
    settle(main())
