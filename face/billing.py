"""`lorry usage`: what was used and what it cost, by whatever is asked for, whether the service runs or not."""

import csv
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console

from lorry import options
from lorry.calling import call
from lorry.config import default_data
from lorry.printing import plain_console
from lorry.storage.bills import PER_USD, By, Line, bill_with_storage, verify
from lorry.storage.looking import looking
from lorry.tables import AsJson, print_json, print_table, unix

Dimension = StrEnum("Dimension", list(get_args(By)))
Moment = Annotated[datetime | None, typer.Option(help="In UTC")]
_USUAL: tuple[By, ...] = ("tenant", "run", "model", "kind")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a bill is by, of whom, and of when, in Unix seconds."""

    by: Sequence[By] = _USUAL
    where: Mapping[By, str] | None = None
    start: float | None = None
    end: float | None = None


def usage(
    by: Annotated[
        list[Dimension] | None, typer.Option(help="Repeat it for more [default: tenant, run, model, kind]")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's")] = None,
    project: Annotated[str | None, typer.Option(help="Only this project's")] = None,
    key: Annotated[str | None, typer.Option(help="Only this key's, as `lorry keys ls` calls it")] = None,
    run: Annotated[str | None, typer.Option(help="Only this run's")] = None,
    model: Annotated[str | None, typer.Option(help="Only this base model's")] = None,
    kind: Annotated[str | None, typer.Option(help="Only prefill, cached_prefill, sample, train or storage")] = None,
    since: Moment = None,
    until: Annotated[datetime | None, typer.Option(help="In UTC; what was used at that moment is not in it")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV")] = False,
    as_json: AsJson = False,
    check: Annotated[
        bool, typer.Option("--verify", help="Compute all bills again from the journal; exit 1 if they differ")
    ] = False,
    data: options.Data = None,
) -> None:
    """Print tokens and their cost: by tenant, run, base model and kind, or as is asked for, with their sum."""
    said = {"tenant": tenant, "project": project, "key": key, "run": run, "model": model, "kind": kind}
    where: dict[By, str] = {cast("By", name): value for name, value in said.items() if value is not None}
    grouped: tuple[By, ...] = tuple(cast("By", each.value) for each in dict.fromkeys(by)) if by else _USUAL
    asked = Asked(grouped, where, unix(since), unix(until))
    folder = data or default_data()
    if check:
        call(lambda: _verify(folder))
    else:
        call(lambda: _print(folder, asked, "csv" if as_csv else "json" if as_json else "table"))


def print_usage(console: Console, data: Path, asked: Asked) -> None:
    lines = _lines(data, asked)
    if not lines:
        console.print("Nothing has been used yet." if asked == Asked() else "Nothing was used.")
        return
    keeps = any(line.gb_hours for line in lines)
    columns = (*asked.by, "tokens", *(["GB-hours"] if keeps else []), "USD")
    rows = [_row(line, keeps) for line in lines]
    footer = [*("sum", *[""] * (len(asked.by) - 1))[: len(asked.by)], *_row(_sum(lines), keeps)]
    widths = {"USD": 14, "tokens": 12, "GB-hours": 9}
    print_table(columns, rows, "Usage", widths, console, footer)


def _print(data: Path, asked: Asked, form: str) -> None:
    if form == "table":
        print_usage(plain_console(), data, asked)
        return
    lines = _lines(data, asked)
    if form == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow([*asked.by, "tokens", "gb_hours", "usd"])
        writer.writerows([*line.of, line.tokens, line.gb_hours, f"{line.usd:f}"] for line in lines)
    else:
        found = [dict(zip(asked.by, line.of, strict=True)) | _amounts(line) for line in lines]
        print_json({"usage": found, "sum": _amounts(_sum(lines))})


def _row(line: Line, keeps: bool) -> tuple[str, ...]:
    kept = [f"{line.gb_hours:,.3f}" if line.gb_hours else ""] if keeps else []
    return (*(of or "(none)" for of in line.of), f"{line.tokens:,}", *kept, f"{line.usd:,.6f}")


def _sum(lines: Sequence[Line]) -> Line:
    gb_hours = sum(line.gb_hours for line in lines)
    return Line((), sum(line.tokens for line in lines), sum(line.cost for line in lines), gb_hours)


def _amounts(line: Line) -> dict[str, Any]:
    return {"tokens": line.tokens, "gb_hours": line.gb_hours, "usd": line.usd}


def _lines(data: Path, asked: Asked) -> list[Line]:
    with looking(data) as store:
        return bill_with_storage(store, asked.by, asked.where or {}, time.time(), asked.start, asked.end)


def _verify(data: Path) -> None:
    with looking(data) as store:
        found = verify(store)
    for finding in found.findings:
        print(finding)
    usd = Decimal(found.recomputed) / PER_USD
    said = "as they were recorded" if not found.findings else f"and {len(found.findings)} findings"
    print(f"{found.commands:,} requests, {usd:f} USD computed again, {said}.")
    if found.findings:
        sys.exit(1)
