"""Which checkpoints are meant. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lorry.storage.rows import CheckpointKind, CheckpointRow

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|min|h|d)")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Selection:
    """What is None is any. `older_than` is in seconds."""

    tenant: str | None = None
    run: str | None = None
    kind: CheckpointKind | None = None
    older_than: float | None = None


def selected(rows: Iterable[CheckpointRow], wanted: Selection, now: float) -> list[CheckpointRow]:
    """Those that a user has named and that are not over; newest first."""
    there = [row for row in rows if not row.ephemeral and (row.expires_at is None or row.expires_at > now)]
    meant = [row for row in there if _is_meant(row, wanted, now)]
    return sorted(meant, key=lambda row: row.created_at, reverse=True)


def _is_meant(row: CheckpointRow, wanted: Selection, now: float) -> bool:
    return (
        wanted.tenant in (None, row.tenant)
        and wanted.run in (None, row.run)
        and wanted.kind in (None, row.kind)
        and (wanted.older_than is None or now - row.created_at > wanted.older_than)
    )


def seconds_of(text: str) -> float:
    """Of `90s`, `45min`, `12h` or `30d`. Raises ValueError for anything else."""
    if (found := _DURATION.fullmatch(text)) is None:
        raise ValueError(f"{text!r} is none, expected a number and a unit: 90s, 45min, 12h or 30d")
    return float(found[1]) * _SECONDS[found[2]]
