"""A run's numbers: logged, and read as they are asked for. Lorry's own, for the SDK has no word for them."""

from collections.abc import AsyncGenerator
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, Field

from ...client.metric_files import FORMATS, MEDIA_TYPES, MetricWriter, writer_of
from ...client.rest import RestClient
from ...wire.errors import InvalidRequestError
from ...wire.ids import RunId
from ...wire.metrics import MetricPlace, MetricPoint, ReadMetrics, RunMetrics
from ..bodies import body_of
from ..broker import Broker, BrokerOf

router = APIRouter()


class _Point(BaseModel):
    """JSON has no word for what is not finite: "NaN", "Infinity" and "-Infinity" are taken for it."""

    step: int = Field(ge=0, lt=2**62)
    values: dict[str, float]
    at: float | None = None


class _Points(BaseModel):
    points: list[_Point]


@router.post("/training_runs/{run_id}/metrics", status_code=204)
async def log_metrics(broker: BrokerOf, run_id: str, body: Annotated[_Points, Depends(body_of(_Points))]) -> Response:
    """They are durable when this answers."""
    points = [MetricPoint(point.step, point.values, point.at) for point in body.points]
    await RestClient(broker.connection).log_run_metrics_async(run_id, points)
    return Response(status_code=204)


@router.get("/training_runs/{run_id}/metrics")
async def read_metrics(
    broker: BrokerOf,
    run_id: str,
    format: str = "json",
    name: Annotated[list[str] | None, Query()] = None,
    at_most_points: int | None = None,
) -> Response:
    """All of a run, or what has one of the names; thinned for a plot where `at_most_points` of each name say so."""
    return await exported(broker, run_id, format, name, at_most_points)


async def exported(
    broker: Broker,
    run_id: str,
    format: str,
    name: list[str] | None = None,
    at_most_points: int | None = None,
) -> Response:
    """A run's numbers as a file. Raises NotFoundError, InvalidRequestError."""
    if format not in FORMATS:
        raise InvalidRequestError.of("format", format, f"one of {', '.join(FORMATS)}")
    names = name or await broker.look("metric_names", list[str], run_id)
    writer = await to_thread.run_sync(writer_of, format, names)
    page = await _page(broker, run_id, None, name, at_most_points)
    return StreamingResponse(_written(broker, run_id, name, writer, page), media_type=MEDIA_TYPES[format])


async def _page(
    broker: Broker, run: str, after: MetricPlace | None, names: list[str] | None, at_most_points: int | None = None
) -> RunMetrics:
    return await broker.ask(
        lambda number: ReadMetrics(number, RunId(run), after, at_most_points=at_most_points, names=names), RunMetrics
    )


async def _written(
    broker: Broker, run: str, names: list[str] | None, writer: MetricWriter, page: RunMetrics
) -> AsyncGenerator[bytes]:
    """A page at a time: whoever reads slowly is waited for."""
    yield writer.begin()
    yield await to_thread.run_sync(writer.add, page.points)
    while page.next is not None:
        page = await _page(broker, run, page.next, names)
        yield await to_thread.run_sync(writer.add, page.points)
    yield await to_thread.run_sync(writer.end)
