"""A run's numbers, a row for each step and source: written with the result that they come from, merged where a step has
several."""

from collections.abc import Iterable, Mapping
from contextlib import closing

import msgspec

from ..wire.commands import CommandKind
from ..wire.ids import RunId
from ..wire.metrics import BYTES_AT_ONCE, MetricPlace, MetricPoint, RunMetrics, RunPoint, Source, SourcedPoint
from ..wire.reducing import reduced
from .connection import Connection

_SOURCES: tuple[Source, ...] = ("loop", "training")
_CODE: dict[Source, int] = {source: code for code, source in enumerate(_SOURCES)}
_OF_SOURCE = "FROM run_metrics WHERE run = :run AND source"
PAGE = (
    f"SELECT source, step, at, vals {_OF_SOURCE} = 0 AND step >= :loop"
    f" UNION ALL SELECT source, step, at, vals {_OF_SOURCE} = 1 AND step >= :training"
    " ORDER BY step, source LIMIT :most"
)
OLDEST = f"SELECT step, at, vals {_OF_SOURCE} = :source ORDER BY step LIMIT :most"
NEWEST = f"SELECT step, at, vals {_OF_SOURCE} = :source ORDER BY step DESC LIMIT :most"
_LATEST_BYTES = 8 * BYTES_AT_ONCE
_values = msgspec.msgpack.Decoder(dict[str, float])
_packed = msgspec.msgpack.Encoder()


class Metrics(Connection):
    def step_measured(
        self, run: RunId, kind: CommandKind, told: Mapping[str, float], data: int, now: float
    ) -> SourcedPoint | None:
        """A `forward_backward` or an `optim_step` of the run is done. What it `told`, over so many `data`, belongs to
        the step of which as many optimizer steps were done before: returns all that is known of that now."""
        row = self._db.execute(
            "SELECT steps, data, vals FROM runs LEFT JOIN run_metrics"
            " ON run = runs.id AND step = steps AND source = 1 WHERE runs.id = ?",
            [run],
        ).fetchone()
        step, before, kept = row
        if kind == "optim_step":
            self._db.execute("UPDATE runs SET steps = steps + 1 WHERE id = ?", [run])
        if not told:
            return None
        values = dict(told)
        if kept is not None:
            values = reduced(((_values.decode(kept), before), (told, data)))
        point = SourcedPoint("training", step, now, values)
        self._keep_point(run, point, (before or 0) + data)
        return point

    def metrics_logged(self, run: RunId, points: Iterable[MetricPoint], now: float) -> list[SourcedPoint]:
        """Of the user's loop; what is known of each step then."""
        logged: dict[int, SourcedPoint] = {}
        for point in points:
            kept = self._db.execute(
                "SELECT vals FROM run_metrics WHERE run = ? AND step = ? AND source = 0", [run, point.step]
            ).fetchone()
            values = (_values.decode(kept[0]) if kept else {}) | point.values
            logged[point.step] = SourcedPoint("loop", point.step, now if point.at is None else point.at, values)
            self._keep_point(run, logged[point.step], 0)
        return list(logged.values())

    def metrics_named(self, run: RunId, names: Iterable[str]) -> None:
        """It has numbers of these names from now on."""
        self._db.conn.executemany("INSERT OR IGNORE INTO run_metric_names VALUES (?, ?)", [(run, n) for n in names])

    def metric_names_of(self, run: RunId) -> list[str]:
        return [name for (name,) in self._db.execute("SELECT name FROM run_metric_names WHERE run = ?", [run])]

    def metric_names(self) -> dict[RunId, set[str]]:
        found: dict[RunId, set[str]] = {}
        for run, name in self._db.execute("SELECT run, name FROM run_metric_names"):
            found.setdefault(RunId(run), set()).add(name)
        return found

    def run_metrics(self, run: RunId, after: MetricPlace | None, most: int) -> RunMetrics:
        """Up to `most` points behind `after`, with up to about `BYTES_AT_ONCE` of values."""
        found: list[SourcedPoint] = []
        size = 0
        with closing(self._db.execute(PAGE, {"run": run, "most": most, **_firsts(after)})) as rows:
            for source, step, at, vals in rows:
                found.append(SourcedPoint(_SOURCES[source], step, at, _values.decode(vals)))
                if (size := size + len(vals)) >= BYTES_AT_ONCE or len(found) == most:
                    return RunMetrics(found, MetricPlace(step, _SOURCES[source]))
        return RunMetrics(found)

    def latest_metrics(self, runs: Iterable[RunId], most: int = 1) -> list[RunPoint]:
        """By run, source and step, the last points of each source of each of these: `most`, or as many as leave room
        for others'. Of a run for which none is left there are none."""
        series = [(run, code) for run in runs for code in _CODE.values()]
        share, left = BYTES_AT_ONCE // max(1, len(series)), _LATEST_BYTES
        found: list[RunPoint] = []
        for run, code in series:
            of_it: list[RunPoint] = []
            size = 0
            with closing(self._db.execute(NEWEST, {"run": run, "source": code, "most": most})) as rows:
                for step, at, vals in rows:
                    size += len(vals)
                    if size > left or (of_it and size > share):
                        break
                    of_it.append(RunPoint(run, _SOURCES[code], step, at, _values.decode(vals)))
            left -= size
            found += reversed(of_it)
        return found

    def metric_steps(self, run: RunId) -> dict[Source, range]:
        """Of each source that has numbers, from the first step to the last."""
        found: dict[Source, range] = {}
        for source, code in _CODE.items():
            first, last = (
                self._db.execute(sql, {"run": run, "source": code, "most": 1}).fetchone() for sql in (OLDEST, NEWEST)
            )
            if first is not None:
                found[source] = range(first[0], last[0] + 1)
        return found

    def _keep_point(self, run: RunId, point: SourcedPoint, data: int) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO run_metrics (run, step, source, at, data, vals) VALUES (?, ?, ?, ?, ?, ?)",
            [run, point.step, _CODE[point.source], point.at, data, _packed.encode(point.values)],
        )


def _firsts(after: MetricPlace | None) -> dict[Source, int]:
    """From which step on there is something behind that place: of the same step, those of the loop come first."""
    if after is None:
        return {"loop": 0, "training": 0}
    return {source: after.step + (code <= _CODE[after.source]) for source, code in _CODE.items()}
