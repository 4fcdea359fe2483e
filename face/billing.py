"""`lorry usage`: what was used and what it cost, by whatever is asked for, whether the service runs or not."""

import csv
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from lorry import options
from lorry.calling import call
from lorry.config import default_data
from lorry.printing import plain_console
from lorry.storage.bills import PER_USD, By, Line, bill_with_storage, verify
from lorry.storage.looking import looking

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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    check: Annotated[
        bool, typer.Option("--verify", help="Compute all bills again from the journal; exit 1 if they differ")
    ] = False,
    data: options.Data = None,
) -> None:
    """Print tokens and their cost: by tenant, run, base model and kind, or as is asked for, with their sum."""
    said = {"tenant": tenant, "project": project, "key": key, "run": run, "model": model, "kind": kind}
    where: dict[By, str] = {cast("By", name): value for name, value in said.items() if value is not None}
    grouped: tuple[By, ...] = tuple(cast("By", each.value) for each in dict.fromkeys(by)) if by else _USUAL
    asked = Asked(grouped, where, _moment(since), _moment(until))
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
    table = Table(title="Tokens", title_justify="left", show_footer=True)
    for i, name in enumerate(asked.by):
        table.add_column(name, footer="" if i else "sum")
    table.add_column("tokens", justify="right", footer=f"{sum(line.tokens for line in lines):,}")
    keeps = any(line.gb_hours for line in lines)
    if keeps:
        table.add_column("GB-hours", justify="right", footer=f"{sum(line.gb_hours for line in lines):,.3f}")
    table.add_column("USD", justify="right", footer=_usd(_sum(lines)))
    for line in lines:
        kept = [f"{line.gb_hours:,.3f}"] if keeps else []
        table.add_row(*(of or "(none)" for of in line.of), f"{line.tokens:,}", *kept, _usd(line.usd))
    console.print(table)


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
        total = {
            "tokens": sum(line.tokens for line in lines),
            "gb_hours": sum(line.gb_hours for line in lines),
            "usd": _sum(lines),
        }
        print(msgspec.json.Encoder(decimal_format="number").encode({"usage": found, "sum": total}).decode())


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


def _sum(lines: Sequence[Line]) -> Decimal:
    return Decimal(sum(line.cost for line in lines)).scaleb(-12)


def _usd(amount: Decimal) -> str:
    return f"{amount:,.6f}"


def _moment(said: datetime | None) -> float | None:
    return None if said is None else said.replace(tzinfo=UTC).timestamp()
