"""Client sessions: what a user's program has while it runs, over however many connections. Pure; time is passed in."""

from dataclasses import replace
from typing import Literal

from ..storage.rows import ClientSessionRow
from ..wire.errors import NotFoundError, SessionFinishedError
from ..wire.ids import ProjectId, TenantId

SILENT_AFTER_S = 60.0
"""The Tinker SDK sends a heartbeat every 10 s."""


class ClientSessions:
    def __init__(self) -> None:
        self._rows: dict[str, ClientSessionRow] = {}
        self._heard: dict[str, float] = {}

    def add(self, row: ClientSessionRow) -> None:
        self._rows[row.id] = row

    def get(self, tenant: TenantId, session: str | None) -> ClientSessionRow:
        row = self._rows.get(session or "")
        if row is None or row.tenant != tenant:
            raise NotFoundError(f"there is no client session {session!r}", field="session_id")
        return row

    def of(self, tenant: TenantId) -> list[ClientSessionRow]:
        """Newest first."""
        return [row for row in reversed(self._rows.values()) if row.tenant == tenant]

    def touch(self, tenant: TenantId, session: str, now: float) -> None:
        row = self.get(tenant, session)
        if row.reason is not None:
            raise SessionFinishedError(f"client session {session!r} was finished by its client", field="session_id")
        self._heard[session] = now

    def finish(
        self, tenant: TenantId, session: str, reason: Literal["success", "errored", "interrupted"], detail: str | None
    ) -> ClientSessionRow:
        row = replace(self.get(tenant, session), reason=reason, detail=detail)
        self._rows[session] = row
        self._heard.pop(session, None)
        return row

    def assign(self, tenant: TenantId, session: str, project: ProjectId) -> ClientSessionRow:
        """As it was before."""
        row = self.get(tenant, session)
        self._rows[session] = replace(row, project=project)
        return row

    def status(
        self, row: ClientSessionRow, now: float
    ) -> Literal["active", "success", "errored", "interrupted"] | None:
        """What its client said last, if it is not silent."""
        if row.reason is not None:
            return row.reason
        return "active" if now - self._heard.get(row.id, row.created_at) < SILENT_AFTER_S else None
