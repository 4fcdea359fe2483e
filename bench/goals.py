"""What the benchmarks are to reach. One that misses a goal says so last, and ends with 1."""

import sys
from collections.abc import Sequence

from rich.console import Console


def at_least(what: str, found: float, goal: float) -> list[str]:
    """What to say of a goal that was missed, if it was."""
    return [] if found >= goal else [f"{what}: {found:.2f}, the goal is {goal} at least"]


def at_most(what: str, found: float, goal: float) -> list[str]:
    return [] if found <= goal else [f"{what}: {found:.2f}, the goal is {goal} at most"]


def settle(missed: Sequence[str]) -> None:
    for line in missed:
        Console(markup=False).print(f"missed: {line}", style="red", soft_wrap=True)
    sys.exit(1 if missed else 0)
