"""What commands print: tables that fit a terminal, and the same as JSON for programs."""

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from lorry.printing import plain_console
from lorry.wire.words import lasting

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]
NUMBERS = frozenset(
    (
        "tokens",
        "commands",
        "rank",
        "keys",
        "runs",
        "client events",
        "failures",
        "USD",
        "weight",
        "age",
        "busy s",
        "parameters",
        "GiB",
        "with all layers computed again",
        "a second",
        "checkpoints",
        "size",
        "USD a month",
    )
)
"""Columns that stand to the right."""
ONE_RUN = 38
"""Characters of a request's id, of a run in a client session: `session-0123456789abcdef:train:12:1234`."""
_NARROWEST = 6


def print_json(found: object) -> None:
    """Times are Unix seconds."""
    print(msgspec.json.Encoder(decimal_format="number").encode(found).decode())


def table(
    columns: Sequence[str],
    rows: Iterable[Iterable[str]],
    title: str | None = None,
    least: Mapping[str, int] | None = None,
    width: int = 80,
    footer: Sequence[str] | None = None,
) -> Table:
    """Where it is wider than `width`, cells go on in the next line: an id that is cut off is of no use. `least` are the
    characters that a column keeps for as long as others can be narrowed."""
    cells = [list(row) for row in rows]
    made = Table(title=title, title_justify="left", show_footer=footer is not None)
    everything = [columns, *cells, *([footer] if footer else [])]
    natural = [max(_width(row[i]) for row in everything) for i in range(len(columns))]
    floors = [max(_NARROWEST, (least or {}).get(name, 0)) for name in columns]
    widths = narrowed(natural, floors, width - 3 * len(columns) - 1)
    for name, chars, last in zip(columns, widths, footer or [""] * len(columns), strict=True):
        justify = "right" if name in NUMBERS else "left"
        made.add_column(name, justify=justify, overflow="fold", width=chars, footer=last)
    for row in cells:
        made.add_row(*row)
    return made


def narrowed(widths: Sequence[int], floors: Sequence[int], room: int) -> list[int]:
    """Pure: the widest column gives way first, none below its floor unless all are there, and none below 1."""
    left = list(widths)
    while sum(left) > room:
        above = [i for i in range(len(left)) if left[i] > floors[i]] or [i for i in range(len(left)) if left[i] > 1]
        if not above:
            break
        left[max(above, key=left.__getitem__)] -= 1
    return left


def _width(cell: str) -> int:
    return max(map(cell_len, cell.split("\n")))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Iterable[str]],
    title: str | None = None,
    least: Mapping[str, int] | None = None,
    console: Console | None = None,
    footer: Sequence[str] | None = None,
) -> None:
    console = console or plain_console()
    console.print(table(columns, rows, title, least, console.width, footer))


def shown(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:,.1f}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def ago(moment: float) -> str:
    return f"{lasting(time.time() - moment)} ago"


def day(moment: float | None) -> str:
    return "" if moment is None else datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d")


def unix(said: datetime | None) -> float | None:
    """A moment that was said in UTC, in Unix seconds."""
    return None if said is None else said.replace(tzinfo=UTC).timestamp()
