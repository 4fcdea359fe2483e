"""`python -m bench`: the promises that most depends on, in some ten minutes. `--full` takes all that have goals, as
often as each benchmark does it alone, in an hour or more.

Each benchmark has a process of its own, for what one leaves behind, threads and a heap that is slow to collect, takes
time from the next.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping

import torch
from rich.console import Console

from bench.goals import settle
from bench.limits import limits_of

BRIEF: Mapping[str, str] = {
    "engine": "--repetitions 3",
    "passes": "--repetitions 3",
    "sampling": "--models large --repetitions 2",
    "shares": "--shares 0.5 --repetitions 2",
    "end_to_end": "--lengths 32 --rounds 15",
    "over_http": "--turns 5",
    "broker": "--commands 5000",
}
FULL = (
    *("engine", "passes", "experts", "quantised", "low_precision", "sampling", "kernel", "beside_vllm", "long_prompt"),
    *("starting", "shares", "end_to_end", "gateway", "over_http", "broker", "loops", "recovery", "replicas", "journal"),
    *("flood", "models", "wrong_keys", "others_ids", "streaming"),
    *("images", "long_rows", "metrics", "consoles"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="everything")
    chosen = dict.fromkeys(FULL, "") if parser.parse_args().full else BRIEF
    console, started, missed = Console(markup=False), time.perf_counter(), list[str]()
    limits, threads = limits_of(torch.device("cpu"), torch.float32), torch.get_num_threads()
    console.print(f"This machine, in float32 with {threads} threads: {limits}")
    for name, options in chosen.items():
        command = [sys.executable, "-m", f"bench.{name}", *options.split()]
        if subprocess.run(command, check=False).returncode:
            missed.append(f"bench.{name}: see above")
    console.print(f"{len(chosen)} benchmarks in {(time.perf_counter() - started) / 60:.1f} minutes")
    settle(missed)


if __name__ == "__main__":
    main()
