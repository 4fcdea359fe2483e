"""Lays the rows of many runs end to end: which rows share a pass, and in what order. Pure: no tensors, no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Row:
    """Datum `datum` of job `job`, of `length` tokens, to be run through the adapter of key `adapter`."""

    job: int
    datum: int
    adapter: str
    length: int


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows that go through the model together, sorted by adapter, and inside an adapter by length."""

    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        return sum(row.length for row in self.rows)

    def segments(self) -> list[tuple[str, int, int]]:
        """Each adapter's own stretch of the packed row, as (adapter, start, end)."""
        spans: list[tuple[str, int, int]] = []
        start = 0
        for adapter, rows in groupby(self.rows, key=lambda row: row.adapter):
            end = start + sum(row.length for row in rows)
            spans.append((adapter, start, end))
            start = end
        return spans


def pack(rows: Sequence[Row], token_budget: int, slots: int) -> list[Pass]:
    """Splits `rows` into passes of at most `token_budget` tokens and `slots` adapters; a longer row goes alone.

    Adapters keep the order in which they first appear, and each one's rows fill neighbouring passes, so that no
    adapter is fetched twice.
    """
    order = {adapter: i for i, adapter in enumerate(dict.fromkeys(row.adapter for row in rows))}
    passes: list[Pass] = []
    current: list[Row] = []
    adapters: set[str] = set()
    tokens = 0
    for row in sorted(rows, key=lambda row: (order[row.adapter], row.length)):
        full = tokens + row.length > token_budget or len(adapters | {row.adapter}) > slots
        if current and full:
            passes.append(Pass(tuple(current)))
            current, adapters, tokens = [], set(), 0
        current.append(row)
        adapters.add(row.adapter)
        tokens += row.length
    if current:
        passes.append(Pass(tuple(current)))
    return passes
