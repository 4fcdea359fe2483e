"""What tenants call the parts of their work, which client session is in which, and what of it goes first."""

from ..wire.ids import ProjectId, TenantId
from .kept import Keeping

_WITH_ITS_SESSION = (("client_sessions", "id"), ("runs", "session"), ("samplers", "session"))


class Projects(Keeping):
    def projects(self) -> list[tuple[TenantId, ProjectId, float]]:
        """Each with when it was made, in Unix seconds; the oldest first."""
        rows = self.rows("SELECT tenant, name, created_at FROM projects ORDER BY created_at, name")
        return [(TenantId(row["tenant"]), ProjectId(row["name"]), row["created_at"]) for row in rows]

    def project_made(self, tenant: TenantId, project: ProjectId, now: float) -> None:
        values = {"tenant": tenant, "name": project, "created_at": now}
        self._db.table("projects").insert(values, ignore=True)

    def lane_prioritised(self, lane: str, priority: int) -> None:
        for table in ("runs", "samplers"):
            self._db.execute(f"UPDATE {table} SET priority = ? WHERE id = ?", [priority, lane])

    def session_assigned(self, session: str, project: ProjectId, now: float) -> None:
        """With all that was made in it; what is kept of it is kept in the new one from now on."""
        self._go_on("run IN (SELECT id FROM runs WHERE session = ?)", now, session, project=project)
        for table, column in _WITH_ITS_SESSION:
            self._db.execute(f"UPDATE {table} SET project = ? WHERE {column} = ?", [project, session])
