"""What is kept, for how long, and what that costs: an interval for each checkpoint with a name, from when it was saved
until its name is gone.

As of tokens, prices and costs are whole numbers: micro-dollars for a GB (10**9 bytes) and a month of 720 hours, and
millionths of a micro-dollar. What an interval has cost by a moment is rounded down, and what a part of it has cost is a
difference of two such numbers: so parts add up to the whole, however it is divided.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal, TypeAlias

from ..wire.types import DEFAULT_PROJECT
from .connection import Connection
from .rows import CheckpointRow

By: TypeAlias = Literal["tenant", "project", "key", "run", "model", "kind", "day", "hour"]
_BYTE_US_A_MONTH = 10**9 * 720 * 3600 * 10**6
_COLUMNS: Mapping[By, str] = {
    "tenant": "tenant",
    "project": "project",
    "key": "coalesce(key, '')",
    "run": "run",
    "model": "base_model",
}
_SPAN_S = {"day": 86_400, "hour": 3_600}


@dataclass(frozen=True, slots=True)
class Kept:
    """`of` are what was grouped by; days and hours are UTC. `byte_us` are bytes times microseconds."""

    of: tuple[str, ...]
    byte_us: int
    cost: int

    @property
    def gb_hours(self) -> float:
        return self.byte_us / (10**9 * 3600 * 10**6)


class Keeping(Connection):
    """Written with the checkpoints' own rows, in their transactions."""

    def storage_priced(self, price: int, now: float) -> None:
        """From now on, of what is kept already, too. In micro-dollars for a GB and a month."""
        if self.storage_price() != price:
            self._db.execute("DELETE FROM storage_price")
            self._db.execute("INSERT INTO storage_price (price) VALUES (?)", [price])
            self._go_on("until IS NULL", now, price=price)

    def _go_on(self, where: str, now: float, *values: object, **changed: object) -> None:
        """From now on something of what is kept is another: it is kept until now, and goes on as that. What has expired
        ended then."""
        for row in self.rows(f"SELECT * FROM stored WHERE {where} AND until IS NULL", *values):
            ends = max(row["since"], now if row["expires_at"] is None else min(now, row["expires_at"]))
            self._db.execute("UPDATE stored SET until = ? WHERE id = ?", [ends, row["id"]])
            if row["expires_at"] is None or row["expires_at"] > ends:
                goes_on = {name: value for name, value in row.items() if name != "id"}
                self._db.table("stored").insert(goes_on | {"since": ends} | changed)

    def storage_price(self) -> int:
        rows = self.rows("SELECT price FROM storage_price")
        return rows[0]["price"] if rows else 0

    def _keep(self, checkpoint: CheckpointRow, since: float) -> None:
        """It has a name: whatever had it before is kept no longer."""
        self._let_go(checkpoint.path, since)
        runs = self.rows("SELECT base_model, project, key FROM runs WHERE id = ?", checkpoint.run)
        whose = runs[0] if runs else {"base_model": "", "project": DEFAULT_PROJECT, "key": None}
        values = {
            "path": checkpoint.path,
            "run": checkpoint.run,
            "tenant": checkpoint.tenant,
            "bytes": checkpoint.size_bytes,
            "price": self.storage_price(),
            "since": since,
            "expires_at": checkpoint.expires_at,
        }
        self._db.table("stored").insert(values | whose)

    def _expire(self, checkpoint: CheckpointRow) -> None:
        """It has another end."""
        end = "UPDATE stored SET expires_at = ? WHERE path = ? AND until IS NULL"
        self._db.execute(end, [checkpoint.expires_at, checkpoint.path])

    def _let_go(self, path: str, at: float) -> None:
        self._db.execute("UPDATE stored SET until = max(since, ?) WHERE path = ? AND until IS NULL", [at, path])

    def kept(
        self,
        by: Sequence[By],
        now: float,
        start: float | None = None,
        end: float | None = None,
        where: Mapping[By, str] | None = None,
    ) -> list[Kept]:
        """From `start` on, before `end`, in Unix seconds, and by `now` at the latest; what was saved first comes first.
        `where` cannot be a time."""
        conditions = [f"{_COLUMNS[each]} = :{each}" for each in where or {} if each in _COLUMNS]
        if (where or {}).get("kind", "storage") != "storage":
            return []
        rows = self.rows(
            "SELECT *, min(coalesce(until, :now), coalesce(expires_at, :now), :end) AS ends FROM stored"
            f" WHERE since < :end AND ends > :start{''.join(f' AND {each}' for each in conditions)} ORDER BY since",
            start=start or 0.0,
            end=min(now, end if end is not None else now),
            now=now,
            **{str(name): value for name, value in (where or {}).items()},
        )
        found: dict[tuple[str, ...], list[int]] = {}
        for row in rows:
            low = max(row["since"], start or 0.0)
            for began, ended in _divided(low, row["ends"], by):
                sums = found.setdefault(tuple([_named(row, each, began) for each in by]), [0, 0])
                sums[0] += row["bytes"] * (_us(ended) - _us(began))
                sums[1] += _cost_by(row, ended) - _cost_by(row, began)
        return [Kept(of, *sums) for of, sums in found.items()]

    def storage_findings(self) -> list[str]:
        """What the intervals and the checkpoints disagree about."""
        rows = self.rows(
            "SELECT path || ': kept, and no interval says so' AS problem FROM checkpoints WHERE NOT ephemeral"
            "  AND NOT EXISTS (SELECT 1 FROM stored WHERE stored.path = checkpoints.path AND until IS NULL"
            "   AND bytes = size_bytes)"
            " UNION ALL SELECT path || ': billed as kept, and gone' FROM stored WHERE until IS NULL"
            "  AND path NOT IN (SELECT path FROM checkpoints WHERE NOT ephemeral)"
            " UNION ALL SELECT path || ': billed from ' || since || ' until ' || until FROM stored WHERE until < since"
            " UNION ALL SELECT a.path || ': billed twice at ' || b.since FROM stored AS a JOIN stored AS b"
            "  ON a.path = b.path AND a.id != b.id AND a.since <= b.since AND coalesce(a.until, 1e18) > b.since"
            "  AND (a.since < b.since OR a.id < b.id)"
        )
        return [row["problem"] for row in rows]


def _divided(low: float, high: float, by: Sequence[By]) -> Iterator[tuple[float, float]]:
    """At the ends of days or hours, where these are asked for."""
    span = next((_SPAN_S[each] for each in ("hour", "day") if each in by), None)
    while low < high:
        ends = high if span is None else min(high, (low // span + 1) * span)
        yield low, ends
        low = ends


def _named(row: dict[str, object], each: By, began: float) -> str:
    match each:
        case "kind":
            return "storage"
        case "day":
            return _moment(began // 86_400 * 86_400, "%Y-%m-%d")
        case "hour":
            return _moment(began // 3_600 * 3_600, "%Y-%m-%dT%H:00")
        case "model":
            return str(row["base_model"])
        case _:
            return str(row[each] or "")


@lru_cache(maxsize=2048)
def _moment(at: float, form: str) -> str:
    return datetime.fromtimestamp(at, UTC).strftime(form)


def _us(at: float) -> int:
    return round(at * 1e6)


def _cost_by(row: dict[str, object], at: float) -> int:
    """Of an interval, by this moment of it, in millionths of a micro-dollar."""
    price, size, since = row["price"], row["bytes"], row["since"]
    assert isinstance(price, int)
    assert isinstance(size, int)
    assert isinstance(since, float)
    return price * 10**6 * size * (_us(at) - _us(since)) // _BYTE_US_A_MONTH
