"""`lorry storage`: what is kept, whose it is, and who is near their limit."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console

from lorry import options
from lorry.calling import call
from lorry.config import default_data
from lorry.printing import plain_console
from lorry.scheduler.planning.limits import Holder, Meters, key_holder, project_holder, tenant_holder
from lorry.storage.looking import looking
from lorry.storage.reports import Grouping, kept_now
from lorry.tables import ONE_RUN, AsJson, print_json, print_table
from lorry.wire.ids import KeyId, ProjectId, TenantId
from lorry.wire.words import size

Dimension = StrEnum("Dimension", list(get_args(Grouping)))
NEAR = 0.8
"""Of a limit."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Checkpoints with names: `of` are what was grouped by. `limit_bytes` is a limit of theirs alone, None for none."""

    of: dict[str, str]
    checkpoints: int
    bytes: int
    usd_a_month: float
    limit_bytes: int | None

    @property
    def of_limit(self) -> float | None:
        if self.limit_bytes is None:
            return None
        return self.bytes / self.limit_bytes if self.limit_bytes else 1.0


def storage(
    by: Annotated[list[Dimension] | None, typer.Option(help="Repeat it for more [default: tenant]")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's")] = None,
    near: Annotated[bool, typer.Option("--near", help=f"Only who is at {NEAR:.0%} of a limit")] = False,
    as_json: AsJson = False,
    data: options.Data = None,
) -> None:
    """Print what checkpoints with names take: by tenant, project, key, run or kind, and of which limit."""
    grouped: list[Grouping] = [cast("Grouping", each.value) for each in dict.fromkeys(by or ())] or ["tenant"]

    def run() -> None:
        found = [kept for kept in find_kept(data or default_data(), grouped, tenant) if is_shown(kept, near=near)]
        print_json(found) if as_json else print_kept(plain_console(), grouped, found)

    call(run)


def find_kept(data: Path, by: Sequence[Grouping], tenant: str | None) -> list[Kept]:
    """The largest first."""
    with looking(data) as store:
        rows, limits, price = kept_now(store, by, tenant, time.time()), store.limits(), store.storage_price() / 1e6
    meters = Meters()
    for holder, said in limits.items():
        meters.set(Holder(holder), said)
    return [_kept({each: row[each] for each in by}, row, price, meters) for row in rows]


def _kept(of: dict[str, str], row: dict[str, Any], price: float, meters: Meters) -> Kept:
    limits = (meters.limits(holder).stored_bytes for holder in _holders(of, row["tenants"], row["tenant_of"]))
    least = min((each for each in limits if each is not None), default=None)
    return Kept(of, row["checkpoints"], row["bytes"], row["bytes"] / 1e9 * price, least)


def _holders(of: dict[str, str], tenants: int, tenant: str) -> Iterable[Holder]:
    """Whose limits count for all of this, and for nothing else."""
    match sorted(of):
        case ["tenant"]:
            yield tenant_holder(TenantId(of["tenant"]))
        case ["project"] | ["project", "tenant"] if tenants == 1:
            yield project_holder(TenantId(tenant), ProjectId(of["project"]))
        case ["key"] | ["key", "tenant"] if of["key"]:
            yield key_holder(KeyId(of["key"]))
        case _:
            pass


def is_shown(kept: Kept, *, near: bool) -> bool:
    return not near or (kept.of_limit is not None and kept.of_limit >= NEAR)


def print_kept(console: Console, by: Sequence[Grouping], found: Sequence[Kept]) -> None:
    if not found:
        console.print("Nothing is kept.")
        return
    columns = (*by, "checkpoints", "size", "of limit", "USD a month")
    rows = [_row(kept) for kept in found]
    whole = Kept(
        {}, sum(k.checkpoints for k in found), sum(k.bytes for k in found), sum(k.usd_a_month for k in found), None
    )
    footer = [*("sum", *[""] * (len(by) - 1))[: len(by)], *_row(whole)]
    print_table(columns, rows, "Storage", {"run": ONE_RUN, "size": 9}, console, footer)


def _row(kept: Kept) -> tuple[str, ...]:
    of_limit = "" if kept.of_limit is None else f"{kept.of_limit:.0%} of {size(kept.limit_bytes or 0)}"
    named = (name or "(none)" for name in kept.of.values())
    return (*named, f"{kept.checkpoints:,}", size(kept.bytes), of_limit, f"{kept.usd_a_month:,.2f}")
