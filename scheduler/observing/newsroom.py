"""What is new, and was not told yet, by whom it is for. Pure. Of those whom nobody follows nothing is kept."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from ...wire.ids import RunId, TenantId
from ...wire.metrics import RunPoint, Source, size_of
from ...wire.news import BYTES_AT_MOST, POINTS_AT_MOST, Change

DEPLOYMENT: Final = None
Whose: TypeAlias = TenantId | None
"""A tenant's, or the whole deployment's."""

_DEEDS: frozenset[Change] = frozenset(("runs", "checkpoints", "tenants", "keys"))
"""Such changes are written down for the audit log, too."""


@dataclass(slots=True)
class Gathered:
    """Of a step that changed several times there is one point: what it came to; all have `size` bytes. `missed` says
    that there were too many."""

    points: dict[tuple[RunId, Source, int], RunPoint] = field(default_factory=dict[tuple[RunId, Source, int], RunPoint])
    size: int = 0
    changed: set[Change] = field(default_factory=set[Change])
    missed: bool = False


class Newsroom:
    """`on_news` is called when there is something to tell where there was nothing."""

    def __init__(self) -> None:
        self.on_news: Callable[[], None] = _nobody
        self._followed: dict[Whose, Gathered] = {}
        self._due: dict[Whose, None] = {}

    def follow(self, whose: Whose) -> None:
        """There is something to tell at once."""
        self._followed.setdefault(whose, Gathered())
        self.stir(whose)

    def is_followed(self, whose: Whose) -> bool:
        return whose in self._followed

    def unfollow(self, whose: Whose) -> None:
        self._followed.pop(whose, None)
        self._due.pop(whose, None)

    def measured(self, tenant: TenantId, point: RunPoint) -> None:
        """A step of one of the tenant's runs has come to this."""
        if (gathered := self._followed.get(tenant)) is None:
            return
        place = point.run, point.source, point.step
        before = gathered.points.get(place)
        size = gathered.size + size_of(point.values) - (0 if before is None else size_of(before.values))
        if size <= BYTES_AT_MOST and (before is not None or len(gathered.points) < POINTS_AT_MOST):
            gathered.points[place], gathered.size = point, size
        else:
            gathered.missed = True
        self.stir(tenant)

    def changed(self, tenant: Whose, what: Change) -> None:
        """Something of a tenant, or of no tenant."""
        for whose in {tenant, DEPLOYMENT}:
            if (gathered := self._followed.get(whose)) is not None:
                gathered.changed.add(what)
                if whose is DEPLOYMENT and what in _DEEDS:
                    gathered.changed.add("audit")
                self.stir(whose)

    def worked(self, tenant: TenantId) -> None:
        """A command of the tenant's was accepted, or is over."""
        if (gathered := self._followed.get(tenant)) is not None:
            gathered.changed.add("jobs")
            self.stir(tenant)
        if DEPLOYMENT in self._followed:
            self.stir(DEPLOYMENT)

    def stir(self, whose: Whose) -> None:
        """There may be something to tell, by its looks alone."""
        if whose in self._followed and whose not in self._due:
            self._due[whose] = None
            self.on_news()

    def due(self) -> list[Whose]:
        """Of whom there is something; from now on there is nothing."""
        due, self._due = list(self._due), {}
        return due

    def take(self, whose: Whose) -> Gathered:
        taken, self._followed[whose] = self._followed[whose], Gathered()
        return taken


def _nobody() -> None:
    pass
