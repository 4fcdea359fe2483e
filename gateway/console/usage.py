"""What a tenant used, by day, and what it cost."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from ...wire.catalogue_messages import UsageBetween
from ...wire.types import UsageEvent
from .days import KINDS, by_day, by_run, in_all
from .rendering import page, today
from .visiting import VisitorOf

router = APIRouter()

_RUNS_AT_MOST = 50


@router.get("/usage")
async def usage(visitor: VisitorOf, days: Annotated[int, Query(ge=1, le=31)] = 14) -> Response:
    end = today()
    start = (end - timedelta(days=days - 1)).replace(hour=0, minute=0, second=0, microsecond=0)
    events = await visitor.broker.ask(
        lambda number: UsageBetween(number, start.timestamp(), end.timestamp()), list[UsageEvent]
    )
    runs = by_run(events)
    return page(
        visitor,
        "usage.html",
        days=days,
        kinds=KINDS,
        spent=by_day(events),
        runs=dict(list(runs.items())[:_RUNS_AT_MOST]),
        runs_in_all=len(runs),
        whole=in_all(events),
    )
