"""A run's numbers as files: written page by page, so that none is held whole; and read, as loops write them."""

import csv
import importlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, cast

from ..wire.errors import InvalidRequestError
from ..wire.metrics import LONGEST_NAME, MetricPoint, SourcedPoint, is_name

MEDIA_TYPES = {
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
    "jsonl": "application/jsonl",
    "parquet": "application/vnd.apache.parquet",
}
FORMATS = tuple(MEDIA_TYPES)
_FIXED = ("step", "source", "at")
_ODD = ("NaN", "Infinity", "-Infinity")
_NO_PYARROW = "json, csv or jsonl: where it is written there is no pyarrow, which `pip install lorry[parquet]` brings"


class MetricWriter(Protocol):
    """Each call returns what is to be written next."""

    def begin(self) -> bytes: ...
    def add(self, points: Iterable[SourcedPoint]) -> bytes: ...
    def end(self) -> bytes: ...


def writer_of(form: str, names: Sequence[str]) -> MetricWriter:
    """For one of `FORMATS`. Of csv and parquet the `names` are the columns, behind step, source and at. Raises
    InvalidRequestError for parquet where pyarrow is not installed."""
    match form:
        case "json":
            return _Json()
        case "jsonl":
            return _JsonLines()
        case "csv":
            return _Csv(names)
        case _:
            return _Parquet(names)


def shown(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _line(point: SourcedPoint) -> str:
    values = {name: shown(value) for name, value in point.values.items()}
    return json.dumps({"step": point.step, "source": point.source, "at": point.at, "values": values})


class _JsonLines:
    def begin(self) -> bytes:
        return b""

    def add(self, points: Iterable[SourcedPoint]) -> bytes:
        return "".join(_line(point) + "\n" for point in points).encode()

    def end(self) -> bytes:
        return b""


class _Json:
    def __init__(self) -> None:
        self._between = "\n"

    def begin(self) -> bytes:
        return b'{"points": ['

    def add(self, points: Iterable[SourcedPoint]) -> bytes:
        lines = ",\n".join(map(_line, points))
        between, self._between = self._between, ",\n" if lines else self._between
        return (between + lines).encode() if lines else b""

    def end(self) -> bytes:
        return b"]}\n"


class _Csv:
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def begin(self) -> bytes:
        return _rows([[*_FIXED, *map(_column, self._names)]])

    def add(self, points: Iterable[SourcedPoint]) -> bytes:
        return _rows([p.step, p.source, p.at, *(_cell(p.values.get(name)) for name in self._names)] for p in points)

    def end(self) -> bytes:
        return b""


def _rows(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _cell(value: float | None) -> float | str:
    return "" if value is None else shown(value)


def _column(name: str) -> str:
    """A user's own "step" does not hide the first column."""
    return f"{name} (logged)" if name in _FIXED else name


class _Drain(io.RawIOBase):
    """A file that is only written, whose bytes are taken away meanwhile."""

    def __init__(self) -> None:
        self._written, self._position = bytearray(), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self._written += data
        self._position += len(data)
        return len(data)

    def taken(self) -> bytes:
        taken, self._written = bytes(self._written), bytearray()
        return taken


class _Parquet:
    """A row group for each page."""

    def __init__(self, names: Sequence[str]) -> None:
        try:
            arrow: Any = importlib.import_module("pyarrow")
            parquet: Any = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise InvalidRequestError.of("format", "parquet", _NO_PYARROW) from None
        fixed = [("step", arrow.int64()), ("source", arrow.string()), ("at", arrow.float64())]
        self._schema = arrow.schema([*fixed, *((_column(name), arrow.float64()) for name in names)])
        self._names, self._table, self._drain = names, arrow.table, _Drain()
        self._writer = parquet.ParquetWriter(self._drain, self._schema)

    def begin(self) -> bytes:
        return self._drain.taken()

    def add(self, points: Iterable[SourcedPoint]) -> bytes:
        if rows := list(points):
            columns: list[list[Any]] = [[p.step for p in rows], [p.source for p in rows], [p.at for p in rows]]
            columns += [[p.values.get(name) for p in rows] for name in self._names]
            self._writer.write_table(self._table(columns, schema=self._schema))
        return self._drain.taken()

    def end(self) -> bytes:
        self._writer.close()
        return self._drain.taken()


class MetricLines:
    """Reads lines as loops write them, tinker-cookbook's `metrics.jsonl` among them: an object each, with a step and
    any names beside it; or as they are exported, with `values`. What is no number of a step is counted: lines that
    have none or cannot be read, and by name what is none."""

    def __init__(self) -> None:
        self.unread = self.without_step = 0
        self.no_numbers = Counter[str]()

    def points(self, lines: Iterable[str]) -> Iterator[MetricPoint]:
        for line in lines:
            if line.strip() and (point := self._point(line)) is not None:
                yield point

    def told(self) -> list[str]:
        """What was left out, in words."""
        told = [f"{self.unread:,} lines that are no JSON object"] if self.unread else []
        told += [f"{self.without_step:,} lines without a step"] if self.without_step else []
        return told + [f"{n:,} values of {name!r} that are no numbers" for name, n in sorted(self.no_numbers.items())]

    def _point(self, line: str) -> MetricPoint | None:
        try:
            found: Any = json.loads(line)
        except (ValueError, RecursionError):  # however deep it is nested
            found = None
        if not isinstance(found, dict):
            self.unread += 1
            return None
        said = cast("dict[str, Any]", found)
        step = said.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**62:
            self.without_step += 1
            return None
        values, at = said.get("values"), None
        if isinstance(values, dict):
            at = number_of(said.get("at"))
        else:
            values = {name: value for name, value in said.items() if name != "step"}
        return MetricPoint(step, self._numbers(cast("dict[str, Any]", values)), at)

    def _numbers(self, said: dict[str, Any]) -> dict[str, float]:
        told = {name: number_of(value) for name, value in said.items() if is_name(name)}
        numbers = {name: value for name, value in told.items() if value is not None}
        self.no_numbers.update(ascii(name)[1:-1][:LONGEST_NAME] for name in said.keys() - numbers.keys())
        return numbers


def number_of(value: object) -> float | None:
    """None for what is none."""
    if isinstance(value, str):
        return float(value) if value in _ODD else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
