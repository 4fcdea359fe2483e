"""`python -m tests.chaos`: chaos for as long as you like. A finding comes with the command that repeats it."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .run import Plan, run


def main(
    minutes: Annotated[float, typer.Option(help="How long everything is hurt")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the schedule, and of the networks' chance")] = 1,
    tenants: Annotated[int, typer.Option(min=1, help="Half of them use Lorry's client, half the official SDK")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Of each loop, which a tenant repeats")] = 30,
) -> None:
    """Tenants train and sample while processes are killed and stopped, and networks misbehave."""
    folder = Path(tempfile.mkdtemp(prefix="lorry-chaos-"))
    plan = Plan(seed, tenants, seconds=60 * minutes, steps=steps)
    findings = run(plan, folder, lambda line: print(line, flush=True))
    for line in findings:
        print(f"FINDING  {line}")
    if findings:
        options = f"--minutes {minutes:g} --seed {seed} --tenants {tenants} --steps {steps}"
        print(f"The data and the service's log are in {folder}. Again: python -m tests.chaos {options}")
        sys.exit(1)
    print("No finding.")


if __name__ == "__main__":
    typer.run(main)
