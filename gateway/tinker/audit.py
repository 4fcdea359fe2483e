"""Who made, published, deleted or took away what, and who changed keys and limits."""

from datetime import UTC, date, datetime, timedelta
from typing import Literal

from fastapi import APIRouter
from tinker.types import AuditLogResponse
from tinker.types.audit_log_entry import AuditLogEntry

from ...wire.catalogue_messages import AuditBetween
from ...wire.types import AuditEvent
from ..broker import BrokerOf
from .moments import moment

router = APIRouter()

_OF_THE_ORGANIZATION = ("tenant", "key", "limits")


@router.get("/audit")
async def audit_log(
    broker: BrokerOf,
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: date | None = None,
) -> AuditLogResponse:
    """Of a day in UTC, of the key's tenant; of everybody for a key with the scope `admin`."""
    start = datetime.combine(day or datetime.now(UTC).date(), datetime.min.time(), UTC)
    begins, ends = start.timestamp(), (start + timedelta(days=1)).timestamp()
    found = await broker.ask(lambda number: AuditBetween(number, begins, ends), list[AuditEvent])
    return AuditLogResponse(entries=[_entry(event) for event in found if _is_of(event, event_type)])


def _is_of(event: AuditEvent, wanted: str) -> bool:
    kind = event.event.partition("_")[0]
    return wanted == "all" or wanted == f"{kind}s" or (wanted == "organizations" and kind in _OF_THE_ORGANIZATION)


def _entry(event: AuditEvent) -> AuditLogEntry:
    said: dict[str, object] = {"tenant": event.tenant, "by": event.by, "subject": event.subject, **event.detail}
    path = event.subject if event.event.startswith("checkpoint_") else None
    return AuditLogEntry(
        timestamp=moment(event.at),
        event=event.event,
        event_details=said,
        tinker_path=path,
        model_id=path and path.removeprefix("tinker://").partition("/")[0],
        purpose=event.detail.get("purpose"),
    )
