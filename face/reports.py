"""What `lorry usage` and `lorry status` print, from the database, whether the service runs or not."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from lorry.doctor import Finding
from lorry.storage.looking import looking
from lorry.storage.reports import actors, queues, recent_failures, recent_runs, tenants
from lorry.storage.store import Store
from lorry.wire.codec import decode
from lorry.wire.errors import ErrorInfo

T = TypeVar("T")
Rows: TypeAlias = Sequence[dict[str, Any]]

_SHOWN = 160
"""Characters of an error's message."""


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    table = _table("Findings", "where", "what is wrong", "what to do")
    for finding in findings:
        table.add_row(finding.where, finding.problem, finding.advice)
    console.print(table)


def print_status(console: Console, data: Path) -> None:
    _print_actors(console, _ask(data, actors))
    _print_runs(console, _ask(data, recent_runs))
    _print_queues(console, _ask(data, queues))
    _print_failures(console, _ask(data, recent_failures))
    _print_tenants(console, _ask(data, tenants))


def print_status_as_json(data: Path) -> None:
    """The same for programs: times are Unix seconds."""
    with looking(data) as store:
        found = {
            "actors": actors(store),
            "runs": recent_runs(store),
            "queues": queues(store),
            "failures": [row | {"error": decode(row["error"], ErrorInfo)} for row in recent_failures(store)],
            "tenants": tenants(store),
        }
    print(msgspec.json.encode(found).decode())


def _print_actors(console: Console, rows: Rows) -> None:
    columns = ("actor", "base model", "state", "device", "dtype", "slots", "swaps")
    table = _table("Actors", *columns, "busy s", "sampling", "share", "since")
    for row in rows:
        names = ("id", "base_model", "state", "device", "dtype", "slots", "swaps")
        busy_s = None if row["train_s"] is None else row["train_s"] + row["sample_s"]
        sampling = f"{row['sample_s'] / busy_s:.0%}" if busy_s else ""
        share = "" if row["sample_share"] is None else f"{row['sample_share']:.0%}"
        table.add_row(*(_shown(row[name]) for name in names), _shown(busy_s), sampling, share, _ago(row["started_at"]))
    console.print(table)


def _print_runs(console: Console, rows: Rows) -> None:
    columns = ("run", "tenant", "base model", "rank", "queued", "finished", "failed")
    table = _table("Runs", *columns, "saved to", "replay s", "last request")
    for row in rows:
        names = ("id", "tenant", "base_model", "rank", "queued", "finished", "failed")
        saved_to = "" if row["restore_folder"] is None else f"request {row['restore_seq']:,}"
        last = _ago(row["last_request_at"])
        table.add_row(*(_shown(row[name]) for name in names), saved_to, f"{row['replay_s']:,.1f}", last)
    console.print(table)


def _print_queues(console: Console, rows: Rows) -> None:
    table = _table("Queues", "base model", "tenant", "kind", "commands", "tokens")
    for row in rows:
        table.add_row(*(_shown(row[name]) for name in ("base_model", "tenant", "kind", "commands", "tokens")))
    console.print(table if rows else "Nothing is queued.")


def _print_failures(console: Console, rows: Rows) -> None:
    """What was refused, and what failed: newest first."""
    table = _table("Failures", "request", "tenant", "kind", "when", "why")
    for row in rows:
        error = decode(row["error"], ErrorInfo)
        why = error.message if len(error.message) <= _SHOWN else error.message[: _SHOWN - 1] + "…"
        table.add_row(row["future"], row["tenant"], row["kind"], _ago(row["finished_at"]), f"{error.code}: {why}")
    if rows:
        console.print(table)


def _print_tenants(console: Console, rows: Rows) -> None:
    # An SDK's telemetry is counted, not kept: failures tell whose scripts are in trouble.
    table = _table("Tenants", "tenant", "keys", "runs", "client events", "failures")
    for row in rows:
        table.add_row(*(_shown(row[name]) for name in ("id", "keys", "runs", "client_events", "client_failures")))
    console.print(table)


def _ask(data: Path, question: Callable[[Store], T]) -> T:
    with looking(data) as store:
        return question(store)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    numbers: Sequence[str] = (
        "tokens",
        "commands",
        "slots",
        "swaps",
        "busy s",
        "sampling",
        "share",
        "rank",
        "queued",
        "finished",
        "failed",
        "keys",
        "runs",
        "client events",
        "failures",
        "replay s",
        "USD",
    )
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    return table


def _shown(value: Any) -> str:
    return (
        ""
        if value is None
        else f"{value:,.1f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
