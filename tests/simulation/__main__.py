"""`python -m tests.simulation`: plays histories until one breaks a promise; then shows it, and how to see it again."""

import os
import sys
import time
from typing import Annotated

import typer

from .batches import judged, verdicts
from .history import Finding
from .play import Stage


def main(
    histories: Annotated[int, typer.Option(help="how many are played")] = 1000,
    seed: Annotated[int, typer.Option(help="of the first; the next have the numbers after it")] = 1,
    workers: Annotated[int, typer.Option(help="processes that play")] = 2,
    show: Annotated[bool, typer.Option(help="print the last history whether something was found or not")] = False,
) -> None:
    """Simulates the broker with its clients, actors, disk and network, and checks what they saw."""
    started, events, verdict = time.monotonic(), 0, None
    for played, verdict in enumerate(verdicts(seed, histories, workers), start=1):
        events += verdict.events
        if verdict.findings:
            break
        if played % 5000 == 0:
            typer.echo(f"{played:,} histories, {_rate(played, started)}", err=True)
    assert verdict is not None
    if verdict.findings or show:
        _show(verdict.seed)
    found = f"a finding in the history of seed {verdict.seed}" if verdict.findings else "no finding"
    count = verdict.seed - seed + 1
    typer.echo(f"{count:,} histories, {events:,} events, {_rate(count, started)}: {found}")
    if verdict.findings:
        _list(verdict.findings)
        typer.echo(f"again: python -m tests.simulation --seed {verdict.seed} --histories 1 --show")
        raise typer.Exit(1)


def _show(seed: int) -> None:
    stage = Stage()
    try:
        history = stage.play(seed)
    finally:
        stage.close()
    typer.echo(str(history))
    _list(judged(history).findings)


def _list(findings: tuple[Finding, ...]) -> None:
    for finding in findings:
        typer.echo(f"{finding.check}: {finding.problem}")


def _rate(histories: int, started: float) -> str:
    return f"{60 * histories / (time.monotonic() - started):,.0f} a minute"


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of a set is part of a history
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONHASHSEED": "0"})
    typer.run(main)
