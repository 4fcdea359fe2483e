"""Some hundred histories, and that a seed is always the same one. `make simulation` plays many more."""

import subprocess
import sys
from pathlib import Path

from .planted import CONTROL, FAULTS

ROOT = Path(__file__).resolve().parents[2]


def simulation(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.simulation", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_some_hundred_histories_keep_every_promise() -> None:
    played = simulation("--histories", "100", "--workers", "1")
    assert played.returncode == 0, played.stdout[-20_000:] + played.stderr


def test_a_seed_is_always_the_same_history() -> None:
    once, again = (simulation("--seed", "5", "--histories", "1", "--workers", "1", "--show").stdout for _ in range(2))
    assert len(once) > 1000
    assert once.splitlines()[:-1] == again.splitlines()[:-1]  # the last line says how long it took


def test_planted_faults_are_found() -> None:
    """Two of the list; `make faults` plants all of it, and says after how many histories each is found."""
    names = ("--only", "a command is acknowledged before", "--only", "a refused seq is not passed over")
    command = [sys.executable, "-m", "tests.simulation.faults", "--histories", "25", *names]
    planted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert planted.returncode == 0, planted.stdout + planted.stderr
    assert "2 of 2 faults found" in planted.stdout


def test_no_planted_fault_has_rotted() -> None:
    for fault in (CONTROL, *FAULTS):
        assert (ROOT / fault.file).read_text().count(fault.right) == 1, fault.name
