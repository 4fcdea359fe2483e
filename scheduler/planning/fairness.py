"""Fair queueing by tokens served: who is next, and what it costs. Pure; one Shares object for each base model.

The virtual token counter of Sheng et al. 2024, 'Fairness in Serving Large Language Models': always serve the tenant
that has been served least, relative to its weight; a tenant that comes back from idleness starts at the least of
those who are active, so that it can neither claim the past nor be punished for it.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ...wire.ids import TenantId


class Shares:
    """A tenant of weight 2 gets twice the tokens of a tenant of weight 1 while both have work queued. `weights` may be
    shared with other models' and change at any time; whoever is not in it has 1."""

    def __init__(self, weights: Mapping[TenantId, float] = MappingProxyType({})) -> None:
        self._served: dict[TenantId, float] = {}
        self._weights = weights
        self._active: dict[TenantId, int] = {}
        self._floor = 0.0

    def work_arrived(self, tenant: TenantId) -> None:
        """One more command of `tenant` waits or runs."""
        if tenant not in self._active:
            floor = min((self._served[other] for other in self._active), default=self._floor)
            self._served[tenant] = max(self._served.get(tenant, 0.0), floor)
        self._active[tenant] = self._active.get(tenant, 0) + 1

    def work_left(self, tenant: TenantId) -> None:
        """One command of `tenant` finished or was dropped."""
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]
            if not self._active:
                self._floor = max(self._floor, self._served[tenant])

    def charge(self, tenant: TenantId, tokens: float) -> None:
        """`tokens` may be negative, where an estimate turned out too high."""
        self._served[tenant] = self._served.get(tenant, self._floor) + tokens / self.weight(tenant)

    def served(self, tenant: TenantId) -> float:
        return self._served.get(tenant, self._floor)

    def weight(self, tenant: TenantId) -> float:
        return self._weights.get(tenant, 1.0)

    def active(self) -> list[TenantId]:
        """Who has something that waits or runs."""
        return list(self._active)

    def least_served(self, candidates: Iterable[TenantId]) -> TenantId:
        """Ties go to the first, so a given history always gives the same schedule."""
        return min(dict.fromkeys(candidates), key=self.served)  # many runs are of few tenants
