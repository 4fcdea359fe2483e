"""What is ahead of a command that waits: of its own tenant, and of those who are served before it. Pure.

Others are served before it as long as their counters are lower than its tenant's will be when its turn comes
(`fairness`): with v what each was served, relative to its weight w, and `own` the tokens of its own tenant before it,
another tenant has at most (v_own + own / w_own - v_other) w_other tokens of what it has waiting before it.
"""

from collections.abc import Iterable
from typing import NamedTuple

from ...wire.ids import TenantId
from .fairness import Shares


class Ahead(NamedTuple):
    """`requests` are the same tenant's, and waiting; `tokens` everybody's, also of what is being executed."""

    requests: int
    tokens: int


class Other(NamedTuple):
    """Another of the same tenant's runs: tokens and requests that it has open."""

    tokens: int
    requests: int
    priority: int


def of_own_runs(before: int, priority: int, others: Iterable[Other]) -> tuple[int, float]:
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


def of_others(shares: Shares, tenant: TenantId, own: float, waiting: Iterable[tuple[TenantId, int]]) -> float:
    """Tokens of other tenants, of what each has `waiting`."""
    turn = shares.served(tenant) + own / shares.weight(tenant)
    return sum(
        min(tokens, max(0.0, (turn - shares.served(other)) * shares.weight(other)))
        for other, tokens in waiting
        if other != tenant
    )
