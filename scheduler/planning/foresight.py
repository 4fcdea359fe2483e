"""What is ahead of a command that waits: of its own tenant, and of those who are served before it. Pure.

Others are served before it as long as their counters are lower than its tenant's will be when its turn comes
(`fairness`): with v what each was served, relative to its weight w, and `own` the tokens of its own tenant before it,
another tenant has at most (v_own + own / w_own - v_other) w_other tokens of what it has waiting before it.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ...wire.ids import FutureId, LaneId, TenantId
from .fairness import Shares
from .ledger import Ledger
from .pools import Run, Waiting

_AS_OF_S = 0.5
"""How old what is known of the whole may be: many ask at the same time, and looking at all that waits takes long."""


class Ahead(NamedTuple):
    """`requests` are the same tenant's, and waiting; `tokens` everybody's, also of what is being executed."""

    requests: int
    tokens: int


class Foresight:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: dict[str, tuple[float, Waiting]] = {}

    def ahead(
        self, tenant: TenantId, base_model: str, lane: LaneId, future: FutureId, seq: int, now: float
    ) -> Ahead | None:
        """None for a command that does not wait. `now` is in seconds."""
        before = self._ledger.before(tenant, base_model, lane, future, seq)
        if before is None:
            return None
        whole, requests, own = self._whole(base_model, now), before.requests, before.tokens
        if before.priority is None:
            waiting, under_way = whole.samples, whole.in_sampling
        else:
            others = [run for each, run in whole.runs.get(tenant, {}).items() if each != lane]
            more, tokens = of_own_runs(before.requests, before.priority, others)
            requests, own = requests + more, own + tokens
            waiting = {each: sum(run.tokens for run in runs.values()) for each, runs in whole.runs.items()}
            under_way = whole.in_training
        return Ahead(
            requests, round(own + of_others(self._ledger.shares(base_model), tenant, own, waiting) + under_way)
        )

    def _whole(self, base_model: str, now: float) -> Waiting:
        at, known = self._known.get(base_model, (None, None))
        if at is None or known is None or not 0 <= now - at <= _AS_OF_S:
            known = self._ledger.waiting(base_model)
            self._known[base_model] = now, known
        return known


def of_own_runs(before: int, priority: int, others: Iterable[Run]) -> tuple[int, float]:
    """Requests and tokens of the tenant's other runs that come before a run's request with so many of its own run
    `before` it. Runs of one priority take turns, request by request."""
    requests, tokens = 0, 0.0
    for other in others:
        if other.priority < priority or not other.requests:
            continue
        turns = other.requests if other.priority > priority else min(other.requests, before + 1)
        requests += turns
        tokens += other.tokens * turns / other.requests
    return requests, tokens


def of_others(shares: Shares, tenant: TenantId, own: float, waiting: Mapping[TenantId, int]) -> float:
    """Tokens of other tenants, of what each has `waiting`."""
    turn = shares.served(tenant) + own / shares.weight(tenant)
    return sum(
        min(tokens, max(0.0, (turn - shares.served(other)) * shares.weight(other)))
        for other, tokens in waiting.items()
        if other != tenant
    )
