"""What must be true at the end, of what the loops saw and of what the journal says. It shares nothing with the service
but the journal's tables; each finding is a line."""

import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from math import isclose
from pathlib import Path

import psutil

from lorry.storage.connection import FILE
from tests.network.programs import Report, Work, billed, sent

_OPEN = "SELECT future, kind FROM commands WHERE state = 'queued'"
_FAILED = "SELECT future, kind FROM commands WHERE state IN ('failed', 'discarded')"
_TWICE = "SELECT future, kind FROM usage GROUP BY future, kind HAVING count(*) > 1"
TOLERANCE = 1e-5
"""Whoever shares a pass with others computes the same to the last bit but one."""


def of_loop(work: Work, expected: Report, found: Report) -> Iterator[str]:
    """It saw what the same loop sees in peace."""
    if len(found.seen) != len(expected.seen):
        yield f"{work}: {len(found.seen)} steps of {len(expected.seen)}"
    for before, after in zip(expected.seen, found.seen, strict=False):
        same_loss = isclose(before["loss"], after["loss"], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        if not same_loss or before.get("tokens") != after.get("tokens"):
            yield f"{work}, {found.run}: {after}, and in peace {before}"
            return


def of_bill(data: Path, tenant: str, reports: Iterable[Report]) -> Iterator[str]:
    """What was billed is what the loops sent and got."""
    found, expected = billed(data, tenant), sent(reports)
    if found != expected:
        yield f"{tenant} was billed {_shown(found)} and used {_shown(expected)}"


def of_journal(data: Path) -> Iterator[str]:
    """Every future is answered, none with a failure, and none billed twice."""
    with closing(sqlite3.connect(data / FILE)) as database:
        for problem, query in {"waits": _OPEN, "has failed": _FAILED, "was billed twice": _TWICE}.items():
            yield from (f"{future} ({kind}) {problem}" for future, kind in database.execute(query))


def of_status(data: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "lorry", "status", "--data", str(data)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0 or "Nothing is queued" not in ended.stdout:
        yield f"lorry status says {ended.stdout[-400:]} {ended.stderr[-400:]}"


def of_processes(family: Iterable[psutil.Process]) -> Iterator[str]:
    """Nobody is left behind."""
    yield from (f"{process} is left behind" for process in family if process.is_running())


def _shown(tokens: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(tokens.items()))
