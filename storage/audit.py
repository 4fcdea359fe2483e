"""Who did what to what others depend on: written with the deed, in its transaction, and never changed."""

import json
from typing import Any

from ..wire.ids import TenantId
from ..wire.types import AuditEvent
from .connection import Connection

OPERATOR = "operator"
"""Who can read the data folder, and needs no key."""


class Audit(Connection):
    def audited(self, event: AuditEvent) -> None:
        values = {
            "at": event.at,
            "tenant": event.tenant,
            "by": event.by,
            "event": event.event,
            "subject": event.subject,
            "detail": json.dumps(event.detail),
        }
        self._db.table("audit").insert(values)

    def audit(
        self, tenant: TenantId | None = None, start: float | None = None, end: float | None = None, kind: str = ""
    ) -> list[AuditEvent]:
        """Of this tenant, or of all; from `start` on, before `end`; of one kind of thing, such as checkpoint. In the
        order in which it happened."""
        rows = self.rows(
            "SELECT at, tenant, by, event, subject, detail FROM audit"
            " WHERE (:tenant IS NULL OR tenant = :tenant) AND (:start IS NULL OR at >= :start)"
            " AND (:end IS NULL OR at < :end) AND (:kind = '' OR substr(event, 1, length(:kind) + 1) = :kind || '_')"
            " ORDER BY id",
            tenant=tenant,
            start=start,
            end=end,
            kind=kind,
        )
        return [AuditEvent(**(row | _parsed(row))) for row in rows]


def _parsed(row: dict[str, Any]) -> dict[str, Any]:
    return {"detail": json.loads(row["detail"])}
