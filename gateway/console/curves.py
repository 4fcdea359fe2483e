"""What runs told step by step, as a browser plots it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, Response

from ...wire.errors import InvalidRequestError
from ...wire.ids import RunId
from ...wire.metrics import LatestMetrics, ReadMetrics, RunMetrics, RunPoint, Source, SourcedPoint
from ..broker import Broker
from ..tinker.run_metrics import exported
from .visiting import VisitorOf

router = APIRouter()

RUNS_AT_ONCE = 20
_POINTS_OF_A_PLOT = 1000
Numbers: TypeAlias = dict[str, float | None]
"""By key, as training/loss:sum is of loss:sum; None is what is not finite, which JSON has no number for."""


async def points_of(broker: Broker, run: str, at_most: int = _POINTS_OF_A_PLOT) -> Sequence[SourcedPoint]:
    """By step, thinned so that no metric has more. Raises NotFoundError."""
    found = await broker.ask(lambda number: ReadMetrics(number, RunId(run), at_most_points=at_most), RunMetrics)
    return found.points


@router.get("/runs/{run_id}/metrics")
async def numbers(visitor: VisitorOf, run_id: str, format: Annotated[str, Query()] = "csv") -> Response:
    """All of them, to take away."""
    answer = await exported(visitor.broker, run_id, format)
    answer.headers["content-disposition"] = f'attachment; filename="metrics.{format}"'
    return answer


async def latest_points(broker: Broker, runs: Sequence[str], most: int = 1) -> Sequence[RunPoint]:
    """The last `most` of each source of each run, by step."""
    ids = [RunId(run) for run in runs]
    return await broker.ask(lambda number: LatestMetrics(number, ids, most), list[RunPoint])


@router.get("/curves")
async def curves(visitor: VisitorOf, run: Annotated[list[str], Query()]) -> Response:
    """Of up to twenty runs."""
    ids = list(dict.fromkeys(run))
    if len(ids) > RUNS_AT_ONCE:
        raise InvalidRequestError.of("run", len(ids), f"up to {RUNS_AT_ONCE} runs")
    found = {each: await points_of(visitor.broker, each) for each in ids}
    return JSONResponse({"runs": [{"id": each, "label": label(each), "series": series(found[each])} for each in ids]})


def label(run: str) -> str:
    """Short enough for a legend: what differs between runs stands at both ends."""
    return run if len(run) <= 24 else f"{run[:12]}…{run[-10:]}"


def series(points: Iterable[SourcedPoint]) -> Mapping[str, Mapping[str, list[Any]]]:
    """Each metric's steps and values, by its key: what training told first, and of that the losses."""
    found: dict[str, tuple[list[int], list[float | None]]] = {}
    for point in sorted(points, key=lambda point: (point.source == "loop", point.step)):
        for name, value in _numbers(point.source, point.values).items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(point.step)
            values.append(value)
    ordered = sorted(found.items(), key=lambda item: not item[0].startswith("training/loss"))
    return {key: {"steps": steps, "values": values} for key, (steps, values) in ordered}


def told(points: Iterable[RunPoint], runs: frozenset[str] | None) -> list[dict[str, Any]]:
    """For a browser: of these runs, or of all."""
    return [
        {"run": point.run, "source": point.source, "step": point.step, "values": _numbers(point.source, point.values)}
        for point in points
        if runs is None or point.run in runs
    ]


def _numbers(source: Source, values: Mapping[str, float]) -> Numbers:
    """A loop may call something as training does, so the key says whose it is."""
    return {f"{source}/{name}": value if math.isfinite(value) else None for name, value in values.items()}
