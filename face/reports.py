"""What `lorry status` prints, and `lorry doctor`: from the database, whether the service runs or not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from lorry.doctor import Finding
from lorry.runs import print_runs
from lorry.storage.looking import looking
from lorry.storage.reports import actors, queues, recent_failures, recent_runs, tenants
from lorry.storage.store import Store
from lorry.tables import ONE_RUN, ago, print_json, print_table, shown
from lorry.wire.codec import decode
from lorry.wire.errors import ErrorInfo

Rows: TypeAlias = Sequence[Mapping[str, Any]]

_SHOWN = 160
"""Characters of an error's message."""


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    rows = [(finding.where, finding.problem, finding.advice) for finding in findings]
    print_table(("where", "what is wrong", "what to do"), rows, "Findings", console=console)


def print_status(console: Console, data: Path) -> None:
    with looking(data) as store:
        found = status(store)
    _print_actors(console, found["actors"])
    print_runs(console, found["runs"], "Runs")
    _print_queues(console, found["queues"])
    _print_failures(console, found["failures"])
    _print_tenants(console, found["tenants"])


def print_status_as_json(data: Path) -> None:
    with looking(data) as store:
        found = status(store)
    print_json(found)


def status(store: Store) -> Mapping[str, Rows]:
    return {
        "actors": actors(store),
        "runs": recent_runs(store),
        "queues": queues(store),
        "failures": [row | {"error": decode(row["error"], ErrorInfo)} for row in recent_failures(store)],
        "tenants": tenants(store),
    }


def _print_actors(console: Console, rows: Rows) -> None:
    columns = ("actor, model", "state", "device", "busy s", "sampling", "slots, swaps")
    print_table(columns, map(_actor, rows), "Actors", console=console)


def _actor(row: Mapping[str, Any]) -> tuple[str, ...]:
    busy_s = None if row["train_s"] is None else row["train_s"] + row["sample_s"]
    sampling = f"{row['sample_s'] / busy_s:.0%}" if busy_s else ""
    share = "" if row["sample_share"] is None else f"of {row['sample_share']:.0%}"
    return (
        f"{row['id']}\n{row['base_model']}",
        f"{row['state']}\n{ago(row['started_at'])}",
        f"{row['device']}\n{row['dtype']}",
        shown(busy_s),
        f"{sampling}\n{share}",
        f"{shown(row['slots'])}\n{shown(row['swaps'])}",
    )


def _print_queues(console: Console, rows: Rows) -> None:
    if not rows:
        console.print("Nothing is queued.")
        return
    names = ("base_model", "tenant", "kind", "commands", "tokens")
    cells = [[shown(row[name]) for name in names] for row in rows]
    print_table(("base model", *names[1:]), cells, "Queues", console=console)


def _print_failures(console: Console, rows: Rows) -> None:
    """What was refused, and what failed: newest first."""
    if rows:
        least = {"request, tenant": ONE_RUN}
        print_table(("request, tenant", "why"), map(_failure, rows), "Failures", least, console)


def _failure(row: Mapping[str, Any]) -> tuple[str, ...]:
    error: ErrorInfo = row["error"]
    why = error.message if len(error.message) <= _SHOWN else error.message[: _SHOWN - 1] + "…"
    return f"{row['future']}\n{row['tenant']}\n{ago(row['finished_at'])}", f"{row['kind']}, {error.code}: {why}"


def _print_tenants(console: Console, rows: Rows) -> None:
    # An SDK's telemetry is counted, not kept: failures tell whose scripts are in trouble.
    names = ("id", "keys", "runs", "client_events", "client_failures")
    cells = [[shown(row[name]) for name in names] for row in rows]
    print_table(("tenant", "keys", "runs", "client events", "failures"), cells, "Tenants", console=console)
