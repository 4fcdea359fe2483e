"""What is told of the whole: usage, actors, runs, queues, failures, tenants. It changes nothing."""

from typing import Any

from ..wire.ids import TenantId
from ..wire.types import UsageEvent, UsageRow
from .store import Store


def usage(store: Store, tenant: TenantId | None = None) -> list[UsageRow]:
    rows = store.rows(
        "SELECT tenant, run, base_model, kind, sum(tokens) AS tokens, sum(cost) / 1e12 AS cost_usd FROM usage"
        " WHERE ? IS NULL OR tenant = ? GROUP BY tenant, run, base_model, kind ORDER BY tenant, min(at), run, kind",
        tenant,
        tenant,
    )
    return [UsageRow(**row) for row in rows]


def usage_between(store: Store, tenant: TenantId, start: float, end: float) -> list[UsageEvent]:
    rows = store.rows(
        "SELECT CAST(usage.at / 3600 AS INTEGER) * 3600.0 AS hour, usage.run, runs.session, usage.base_model, kind,"
        " sum(tokens) AS tokens, price / 1e6 AS usd_per_million, sum(cost) / 1e12 AS cost_usd"
        " FROM usage LEFT JOIN runs ON runs.id = usage.run"
        " WHERE usage.tenant = ? AND usage.at >= ? AND usage.at < ?"
        " GROUP BY hour, usage.run, usage.base_model, kind, price ORDER BY hour, tokens DESC",
        tenant,
        start,
        end,
    )
    return [UsageEvent(**row) for row in rows]


def actors(store: Store) -> list[dict[str, Any]]:
    return store.rows("SELECT * FROM actors ORDER BY state = 'ready' DESC, started_at DESC LIMIT 20")


def recent_runs(store: Store) -> list[dict[str, Any]]:
    return store.rows(
        "SELECT runs.*, (SELECT count(*) FROM commands WHERE lane = runs.id AND state = 'queued') AS queued,"
        " (SELECT count(*) FROM commands WHERE lane = runs.id AND state != 'queued') AS finished,"
        " (SELECT count(*) FROM commands WHERE lane = runs.id AND state IN ('failed', 'discarded')) AS failed"
        " FROM runs ORDER BY last_request_at DESC LIMIT 50"
    )


def recent_failures(store: Store) -> list[dict[str, Any]]:
    return store.rows(
        "SELECT commands.future, commands.tenant, commands.kind, commands.finished_at, results.error FROM commands"
        " JOIN results ON results.future = commands.future WHERE commands.state IN ('failed', 'discarded')"
        " ORDER BY commands.finished_at DESC LIMIT 20"
    )


def tenants(store: Store) -> list[dict[str, Any]]:
    return store.rows(
        "SELECT id, client_events, client_failures,"
        " (SELECT count(*) FROM api_keys WHERE tenant = tenants.id) AS keys,"
        " (SELECT count(*) FROM runs WHERE tenant = tenants.id) AS runs FROM tenants ORDER BY id"
    )


def queues(store: Store) -> list[dict[str, Any]]:
    return store.rows(
        "SELECT base_model, tenant, kind, count(*) AS commands, sum(tokens) AS tokens FROM commands"
        " WHERE state = 'queued' GROUP BY base_model, tenant, kind ORDER BY base_model, tenant, kind"
    )
