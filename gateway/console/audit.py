"""Who did what: a tenant's own deeds, or for administrators everybody's."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from ...wire.catalogue_messages import AuditBetween
from ...wire.types import AuditEvent
from .rendering import page, today
from .visiting import VisitorOf

router = APIRouter()

_SHOWN_AT_MOST = 500


@router.get("/audit")
async def audit(
    visitor: VisitorOf, q: Annotated[str, Query()] = "", days: Annotated[int, Query(ge=1, le=366)] = 30
) -> Response:
    end = today()
    start = end - timedelta(days=days)
    events = await visitor.broker.ask(
        lambda number: AuditBetween(number, start.timestamp(), end.timestamp()), list[AuditEvent]
    )
    found = [event for event in events if all(word in _words(event) for word in q.casefold().split())]
    found.sort(key=lambda event: event.at, reverse=True)
    return page(visitor, "audit.html", q=q, days=days, shown=found[:_SHOWN_AT_MOST], total=len(found))


def _words(event: AuditEvent) -> str:
    said = (f"{key}={value}" for key, value in event.detail.items())
    return "\n".join((event.tenant, event.by, event.event, event.subject, *said)).casefold()
