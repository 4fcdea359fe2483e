"""A run's numbers, a row for each step and source: written with the result that they come from, merged where a step has
several."""

from collections.abc import Iterable, Mapping

import msgspec

from ..wire.commands import CommandKind
from ..wire.ids import RunId
from ..wire.metrics import MetricPlace, MetricPoint, RunMetrics, Source, SourcedPoint
from ..wire.reducing import reduced
from .connection import Connection

_SOURCES: tuple[Source, ...] = ("loop", "training")
_CODE = {source: code for code, source in enumerate(_SOURCES)}
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
        """Up to `most` points behind `after`."""
        place = (-1, 0) if after is None else (after.step, _CODE[after.source])
        rows = self._db.execute(
            "SELECT source, step, at, vals FROM run_metrics WHERE run = ? AND (step, source) > (?, ?)"
            " ORDER BY step, source LIMIT ?",
            [run, *place, most],
        ).fetchall()
        points = [SourcedPoint(_SOURCES[source], step, at, _values.decode(vals)) for source, step, at, vals in rows]
        return RunMetrics(points, MetricPlace(points[-1].step, points[-1].source) if len(points) == most else None)

    def metric_steps(self, run: RunId) -> tuple[int, int]:
        """The first and the last that has numbers; 0 and 0 where none has."""
        first, last = self._db.execute("SELECT min(step), max(step) FROM run_metrics WHERE run = ?", [run]).fetchone()
        return first or 0, last or 0

    def _keep_point(self, run: RunId, point: SourcedPoint, data: int) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO run_metrics (run, step, source, at, data, vals) VALUES (?, ?, ?, ?, ?, ?)",
            [run, point.step, _CODE[point.source], point.at, data, _packed.encode(point.values)],
        )
