"""What tenants call the parts of their work. A project is there once somebody has put something into it."""

from collections import defaultdict
from collections.abc import Callable

from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.errors import LimitReachedError
from ..wire.ids import KeyId, ProjectId, TenantId
from ..wire.types import DEFAULT_PROJECT, AuditEvent
from .access.administration import check_project

MAX_PROJECTS = 1000
"""Of one tenant."""


class Projects:
    def __init__(self, writer: Writer, now: Callable[[], float]) -> None:
        self._writer, self._now = writer, now
        self._made = defaultdict[TenantId, dict[ProjectId, float]](dict)

    def load(self, store: Store) -> None:
        for tenant, project, made_at in store.projects():
            self._made[tenant][project] = made_at

    def of(self, tenant: TenantId) -> dict[ProjectId, float | None]:
        """With when each was made."""
        return {DEFAULT_PROJECT: None, **self._made.get(tenant, {})}

    def checked(self, tenant: TenantId, name: ProjectId | None) -> ProjectId:
        """One that is there or may be made. Raises InvalidRequestError, LimitReachedError."""
        if name is None or self._is_there(tenant, name):
            return name or DEFAULT_PROJECT
        check_project(name)
        if len(self._made[tenant]) >= MAX_PROJECTS:
            problem = f"project is {name!r}, and {tenant} has {MAX_PROJECTS:,} already: use one of these"
            raise LimitReachedError(problem, field="project")
        return name

    def made(self, tenant: TenantId, name: ProjectId, by: KeyId) -> None:
        """If new; it was `checked`."""
        if self._is_there(tenant, name):
            return
        now = self._made[tenant][name] = self._now()

        def record(store: Store) -> None:
            store.project_made(tenant, name, now)
            store.audited(AuditEvent(now, tenant, by, "project_created", name))

        self._writer.write(record)

    def _is_there(self, tenant: TenantId, name: ProjectId) -> bool:
        return name == DEFAULT_PROJECT or name in self._made.get(tenant, {})
