"""`python -m bench`: what was promised of speed, in some ten minutes. `--full` measures everything, as often as each
benchmark does it alone, in an hour or more."""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from bench import (
    beside_vllm,
    broker,
    end_to_end,
    engine,
    experts,
    gateway,
    images,
    journal,
    long_prompt,
    long_rows,
    loops,
    low_precision,
    over_http,
    passes,
    quantised,
    recovery,
    replicas,
    sampling,
    shares,
)
from bench.goals import settle
from bench.limits import limits_of

Bench = Callable[[list[str] | None], list[str]]

BRIEF: Sequence[tuple[Bench, str]] = (
    (engine.main, "--repetitions 4"),
    (passes.main, "--repetitions 3"),
    (sampling.main, "--models large --repetitions 2"),
    (beside_vllm.main, "--turns 3"),
    (shares.main, "--shares 0.5 --repetitions 2"),
    (end_to_end.main, "--lengths 32 --rounds 15"),
    (over_http.main, "--turns 5"),
    (broker.main, "--commands 5000"),
    (recovery.main, "--parts cold --seconds 2 --turns 2 --registered 200"),
)
FULL: Sequence[Bench] = (
    engine.main,
    passes.main,
    experts.main,
    quantised.main,
    low_precision.main,
    sampling.main,
    beside_vllm.main,
    long_prompt.main,
    shares.main,
    end_to_end.main,
    gateway.main,
    over_http.main,
    broker.main,
    loops.main,
    recovery.main,
    replicas.main,
    journal.main,
    images.main,
    long_rows.main,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="everything")
    console, started = Console(markup=False), time.perf_counter()
    limits, threads = limits_of(torch.device("cpu"), torch.float32), torch.get_num_threads()
    console.print(f"This machine, in float32 with {threads} threads: {limits}")
    chosen = [(bench, "") for bench in FULL] if parser.parse_args().full else BRIEF
    missed = [line for bench, options in chosen for line in bench(options.split())]
    console.print(f"{len(chosen)} benchmarks in {(time.perf_counter() - started) / 60:.1f} minutes")
    settle(missed)


if __name__ == "__main__":
    main()
