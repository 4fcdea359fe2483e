"""What was used, and what it cost: grouped as is asked for, in whole numbers, and checked against the journal.

Costs are in millionths of a micro-dollar, as `scheduler.planning.prices` counts them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from .kept import By
from .store import Store

_COLUMNS: Mapping[By, str] = {
    "tenant": "tenant",
    "project": "project",
    "key": "coalesce(key, '')",
    "run": "coalesce(run, '')",
    "model": "base_model",
    "kind": "kind",
    "day": "date(at, 'unixepoch')",
    "hour": "strftime('%Y-%m-%dT%H:00', at, 'unixepoch')",
}
PER_USD = 10**12
_MICRO = 10**6
_SAME = (("owner", "tenant"), ("model", "base_model"), ("with_key", "key"), ("of_project", "project"))
"""What a command says of itself, and what its bill does."""


@dataclass(frozen=True, slots=True)
class Line:
    """`of` are what was grouped by; days and hours are UTC. `gb_hours` were kept, of 10**9 bytes."""

    of: tuple[str, ...]
    tokens: int
    cost: int
    gb_hours: float = 0.0

    @property
    def usd(self) -> Decimal:
        return Decimal(self.cost).scaleb(-12)


def bill(
    store: Store,
    by: Sequence[By],
    where: Mapping[By, str] | None = None,
    start: float | None = None,
    end: float | None = None,
) -> list[Line]:
    """From `start` on, before `end`, in Unix seconds; in the order in which each was first used. Sums are as exact as
    what they are of, however large: SQLite's own would not go beyond 2**63."""
    names = [f"{_COLUMNS[each]} AS by_{each}" for each in by]
    said: dict[str, object] = {str(name): value for name, value in (where or {}).items()}
    said |= {"start": start, "end": end}
    conditions = [f"{_COLUMNS[each]} = :{each}" for each in where or ()]
    conditions += [] if start is None else ["at >= :start"]
    conditions += [] if end is None else ["at < :end"]
    rows = store.rows(
        f"SELECT {''.join(f'{name}, ' for name in names)}sum(tokens) AS tokens, sum(cost / {PER_USD}) AS usd,"
        f" sum(cost % {PER_USD} / {_MICRO}) AS micro_usd, sum(cost % {_MICRO}) AS rest FROM usage"
        f"{' WHERE ' if conditions else ''}{' AND '.join(conditions)}"
        f" GROUP BY {', '.join(f'by_{each}' for each in by) or 'NULL'} HAVING count(*) > 0 ORDER BY min(at)",
        **said,
    )
    return [Line(tuple(row[f"by_{each}"] for each in by), row["tokens"], _cost(row)) for row in rows]


def bill_with_storage(
    store: Store,
    by: Sequence[By],
    where: Mapping[By, str],
    now: float,
    start: float | None = None,
    end: float | None = None,
) -> list[Line]:
    """As `bill`, and what was kept until `now`, whose kind is storage."""
    lines = {line.of: line for line in bill(store, by, where, start, end)}
    for kept in store.kept(by, now, start, end, where):
        line = lines.get(kept.of, Line(kept.of, 0, 0))
        lines[kept.of] = replace(line, cost=line.cost + kept.cost, gb_hours=kept.gb_hours)
    return list(lines.values())


def _cost(row: Mapping[str, int]) -> int:
    return row["usd"] * PER_USD + row["micro_usd"] * _MICRO + row["rest"]


@dataclass(frozen=True, slots=True)
class Verified:
    """`findings` are what the journal and the bill disagree about."""

    commands: int
    recorded: int
    recomputed: int
    findings: tuple[str, ...]


def verify(store: Store) -> Verified:
    """The bill computed again, command by command: each that succeeded, and no other, is billed to its tenant, once for
    each kind of tokens, at the price of its time."""
    with store.snapshot():
        return _verified(store)


def _verified(store: Store) -> Verified:
    findings: list[str] = []
    recomputed, commands = 0, set[str]()
    kinds = Counter[tuple[str, str]]()
    rows = store.rows(
        "SELECT usage.future, usage.kind, usage.tenant, usage.base_model, usage.key, usage.project, usage.tokens,"
        " usage.price, usage.cost, commands.state, commands.tenant AS owner, commands.base_model AS model,"
        " commands.key AS with_key, commands.project AS of_project"
        " FROM usage LEFT JOIN commands ON commands.future = usage.future ORDER BY usage.at"
    )
    for row in rows:
        recomputed += row["tokens"] * row["price"]
        commands.add(row["future"])
        kinds[row["future"], row["kind"]] += 1
        findings += [f"{row['future']}, {row['kind']}: {problem}" for problem in _problems(row)]
    findings += [f"{future}, {kind}: billed {n} times" for (future, kind), n in kinds.items() if n > 1]
    unbilled = store.rows(
        "SELECT future FROM commands WHERE state = 'done' AND kind IN ('forward', 'forward_backward', 'sample',"
        " 'compute_logprobs') AND NOT EXISTS (SELECT 1 FROM usage WHERE usage.future = commands.future)"
    )
    findings += [f"{row['future']}: done, and not billed" for row in unbilled]
    findings += store.storage_findings()
    recorded = sum(line.cost for line in bill(store, ()))
    if recorded != recomputed:
        findings.append(f"the bill says {recorded}, its commands {recomputed} millionths of a micro-dollar")
    return Verified(len(commands), recorded, recomputed, tuple(findings))


def _problems(row: Mapping[str, object]) -> list[str]:
    tokens, price, cost = row["tokens"], row["price"], row["cost"]
    assert isinstance(tokens, int)
    assert isinstance(price, int)
    problems: list[str] = []
    if row["state"] is None:
        problems.append("no such command is in the journal")
    elif row["state"] != "done":
        problems.append(f"billed, and {row['state']}")
    elif any(row[asked] != row[billed] for asked, billed in _SAME):
        problems.append("billed to another tenant, project, model or key than it was asked for with")
    if tokens <= 0:
        problems.append(f"billed for {tokens} tokens")
    if cost != tokens * price:
        problems.append(f"{tokens} tokens at {price} were billed as {cost}")
    return problems
