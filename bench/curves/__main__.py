"""`python -m bench.curves NAME`: one curve, as a table and a JSON line, and as a page of plots where `--page` says."""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from bench.curves import commands, sampling, service, training
from bench.curves.curve import Curve, json_of, table_of, write_page

POWERS = [2**n for n in range(12)]
LARGE, DEMO = "41.6 M parameters", "the demo's model, one thread"
CURVES = {
    "tenants": Curve(f"{LARGE}, a row of 32 tokens of each tenant", "tenants", POWERS[:7], training.tenants),
    "ranks": Curve(f"{LARGE}, 8 tenants with a row of 128 tokens", "rank", POWERS[1:7], training.ranks),
    "rows": Curve(f"{LARGE}, 4 tenants with a row", "tokens of a row", POWERS[5:], training.rows),
    "sequences": Curve(f"{LARGE}, 64 tokens behind 64, up to 8 adapters", "sequences", POWERS[:7], sampling.sequences),
    "runs": Curve(f"{DEMO}, 8 slots, 8 runs at a time", "registered runs", [1, 8, 64, 256, 1000], service.runs),
    "clients": Curve(f"{DEMO}, a loop of each client", "clients", [1, 4, 16, 64, 256, 1000], service.clients),
    "commands": Curve(
        "a broker with its journal, an actor that does nothing",
        "commands/s",
        [1, 10, 100, 300, 1000, 3000, 10_000, 20_000],
        commands.commands,
    ),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CURVES)
    parser.add_argument("--at", type=int, nargs="+", help="other points, in rising order")
    parser.add_argument("--page", type=Path, help="an HTML file to write")
    options = parser.parse_args(arguments)
    curve = CURVES[options.name]
    at = options.at or curve.at
    console = Console()
    made = track(curve.measure(at), options.name, len(at), console=Console(stderr=True), transient=True)
    points = list(made)
    table = table_of(curve, points)
    table.caption = f"{torch.get_num_threads()} threads of torch in this process"
    console.print(table)
    print(json_of(options.name, points))
    if options.page is not None:
        write_page(options.page, curve, points)


if __name__ == "__main__":
    main()
