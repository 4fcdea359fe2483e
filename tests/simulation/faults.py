"""`python -m tests.simulation.faults`: plants each fault in a copy, and shows that the simulation finds it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .planted import CONTROL, FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("actors", "client", "gateway", "scheduler", "storage", "wire")
_FOUND = re.compile(r"^([\d,]+) histories,.*\n(\w[\w ]*): (.*)", re.MULTILINE)


class RottenFaultError(Exception):
    """The text that it replaces is not in its file exactly once: the code has changed, so the fault must too."""


@dataclass(frozen=True, slots=True)
class Trial:
    """`check` found it in the last of so many `histories`; None where nothing did."""

    fault: Fault
    histories: int
    check: str | None


def plant(fault: Fault, root: Path) -> None:
    """Make a copy of the code at `root`, as it installs, with the fault in it. Raises RottenFaultError."""
    shutil.copytree(ROOT / "face", root / "lorry")
    for package in _PACKAGES:
        shutil.copytree(ROOT / package, root / "lorry" / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "simulation", root / "tests" / "simulation")
    (root / "tests" / "__init__.py").touch()
    file = root / fault.file if fault.file.startswith("tests/") else root / "lorry" / fault.file
    text = file.read_text()
    if (found := text.count(fault.right)) != 1:
        raise RottenFaultError(f"{fault.name}: {found} times in {fault.file}: {fault.right!r}")
    file.write_text(text.replace(fault.right, fault.wrong))


def tried(fault: Fault, histories: int, seed: int) -> Trial:
    with tempfile.TemporaryDirectory(prefix="lorry-fault-") as folder:
        root = Path(folder)
        plant(fault, root)
        command = [sys.executable, "-m", "tests.simulation", "--workers", "1"]
        command += ["--histories", str(histories), "--seed", str(seed)]
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONHASHSEED": "0"}
        played = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    found = _FOUND.search(played.stdout)
    if played.returncode and not found:
        raise RuntimeError(f"{fault.name}: {played.stdout[-2000:]}{played.stderr[-2000:]}")
    trial = Trial(fault, int(found[1].replace(",", "")), found[2]) if found else Trial(fault, histories, None)
    typer.echo(f"{trial.check or 'no finding'} ({trial.histories}): {fault.name}", err=True)
    return trial


def main(
    histories: Annotated[int, typer.Option(help="most that are played for each fault")] = 5000,
    seed: Annotated[int, typer.Option(help="of the first history")] = 1,
    workers: Annotated[int, typer.Option(help="faults that are tried at a time")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="parts of the names of those to try")] = None,
) -> None:
    """Shows that the simulation finds what it is there to find; ends with an error where it does not."""
    if tried(CONTROL, histories, seed).check is not None:
        typer.echo("the code as it is breaks a promise in these histories, or the checker is wrong: nothing is shown")
        raise typer.Exit(1)
    chosen = [fault for fault in FAULTS if any(part in fault.name for part in only or [""])]
    with ThreadPoolExecutor(workers) as pool:
        trials = list(pool.map(tried, chosen, repeat(histories), repeat(seed)))
    table = Table("fault", "file", "found after", "by the check")
    for trial in trials:
        after = f"{trial.histories:,}" if trial.check else f"not in {trial.histories:,}"
        table.add_row(trial.fault.name, trial.fault.file, after, trial.check or "")
    Console(width=150).print(table)
    missed = sum(trial.check is None for trial in trials)
    typer.echo(f"{len(trials) - missed} of {len(trials)} faults found")
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
