"""What is told of the whole: usage, actors, runs, queues, failures, tenants. It changes nothing."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from ..wire.ids import ProjectId, TenantId
from ..wire.overview import Job, JobsWanted
from ..wire.types import UsageEvent, UsageRow
from .kept import Kept
from .store import Store

Grouping: TypeAlias = Literal["tenant", "project", "key", "run", "kind"]
_GROUPS: Mapping[Grouping, str] = {
    "tenant": "checkpoints.tenant",
    "project": "runs.project",
    "key": "coalesce(runs.key, '')",
    "run": "checkpoints.run",
    "kind": "checkpoints.kind",
}
_USD = "total(cost) / 1e12"
"""A sum() ends at 2**63, which are some nine million dollars."""
_RUN_OF_PATH = "substr(model_path, 10, instr(substr(model_path, 10), '/') - 1)"
_NOBODY = "no broker serves this data: it goes on when one does"


def usage(store: Store, tenant: TenantId | None = None) -> list[UsageRow]:
    rows = store.rows(
        f"SELECT tenant, run, base_model, kind, sum(tokens) AS tokens, {_USD} AS cost_usd FROM usage"
        " WHERE ? IS NULL OR tenant = ? GROUP BY tenant, run, base_model, kind ORDER BY tenant, min(at), run, kind",
        tenant,
        tenant,
    )
    return [UsageRow(**row) for row in rows]


def usage_between(store: Store, tenant: TenantId, start: float, end: float, now: float) -> list[UsageEvent]:
    """By the hour; what is kept, until `now`."""
    rows = store.rows(
        "SELECT CAST(usage.at / 3600 AS INTEGER) * 3600.0 AS hour, usage.run, usage.project, runs.session,"
        " usage.base_model, kind, sum(tokens) AS tokens, price / 1e6 AS usd_per_million,"
        f" {_USD} AS cost_usd"
        " FROM usage LEFT JOIN runs ON runs.id = usage.run"
        " WHERE usage.tenant = ? AND usage.at >= ? AND usage.at < ?"
        " GROUP BY hour, usage.run, usage.project, usage.base_model, kind, price ORDER BY hour, tokens DESC",
        tenant,
        start,
        end,
    )
    runs = store.rows("SELECT id, session FROM runs WHERE tenant = ?", tenant)
    sessions = {row["id"]: row["session"] for row in runs}
    kept = store.kept(("hour", "run", "project", "model"), now, start, end, {"tenant": tenant})
    stored = [_stored(each, sessions) for each in kept]
    return sorted([*(UsageEvent(**row) for row in rows), *stored], key=lambda event: event.hour)


def _stored(kept: Kept, sessions: dict[str, str | None]) -> UsageEvent:
    cost_usd = kept.cost / 1e12
    hour, run, project, model = kept.of
    return UsageEvent(
        hour=datetime.fromisoformat(hour).replace(tzinfo=UTC).timestamp(),
        run=run,
        session=sessions.get(run),
        base_model=model,
        kind="storage",
        tokens=0,
        usd_per_million=cost_usd / kept.gb_hours * 720 if kept.gb_hours else 0.0,
        cost_usd=cost_usd,
        project=ProjectId(project),
        gb_hours=kept.gb_hours,
    )


def kept_now(store: Store, by: Sequence[Grouping], tenant: str | None, now: float) -> list[dict[str, Any]]:
    """Checkpoints with names, grouped, the largest group first: how many, their `bytes`, of how many `tenants`, and of
    which one, where it is one."""
    names = "".join(f"{_GROUPS[each]} AS {each}, " for each in by)
    return store.rows(
        f"SELECT {names}count(*) AS checkpoints, sum(size_bytes) AS bytes,"
        " count(DISTINCT checkpoints.tenant) AS tenants, min(checkpoints.tenant) AS tenant_of"
        " FROM checkpoints JOIN runs ON runs.id = checkpoints.run"
        " WHERE NOT ephemeral AND (expires_at IS NULL OR expires_at > :now)"
        " AND (:tenant IS NULL OR checkpoints.tenant = :tenant)"
        f" GROUP BY {', '.join(str(n + 1) for n in range(len(by)))} ORDER BY bytes DESC",
        now=now,
        tenant=tenant,
    )


def actors(store: Store) -> list[dict[str, Any]]:
    return store.rows("SELECT * FROM actors ORDER BY state = 'ready' DESC, started_at DESC LIMIT 20")


def endings(store: Store, limit: int = 200) -> list[dict[str, Any]]:
    """How actors ended, and why, the newest first; models that could not be loaded among them."""
    return store.rows(
        "SELECT at, subject AS actor, replace(kind, 'actor ', '') AS how, detail AS why FROM events"
        " WHERE kind IN ('actor lost', 'actor stopped', 'load failed') ORDER BY at DESC LIMIT ?",
        limit,
    )


def recent_runs(
    store: Store, tenant: str | None = None, base_model: str | None = None, limit: int = 50
) -> list[dict[str, Any]]:
    """The one used last comes first."""
    return store.rows(
        "SELECT runs.*, (SELECT count(*) FROM commands WHERE lane = runs.id AND state = 'queued') AS queued,"
        " (SELECT count(*) FROM commands WHERE lane = runs.id AND state != 'queued') AS finished,"
        " (SELECT count(*) FROM commands WHERE lane = runs.id AND state IN ('failed', 'discarded')) AS failed"
        " FROM runs WHERE (:tenant IS NULL OR tenant = :tenant) AND (:base_model IS NULL OR base_model = :base_model)"
        " ORDER BY last_request_at DESC LIMIT :limit",
        tenant=tenant,
        base_model=base_model,
        limit=limit,
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
        " (SELECT count(*) FROM api_keys WHERE tenant = tenants.id AND revoked_at IS NULL"
        "  AND (expires_at IS NULL OR expires_at > unixepoch())) AS keys,"
        " (SELECT count(*) FROM runs WHERE tenant = tenants.id) AS runs FROM tenants ORDER BY id"
    )


def integrity(store: Store) -> list[str]:
    """What SQLite finds wrong with the file itself; empty where nothing is."""
    found = [row["integrity_check"] for row in store.rows("PRAGMA integrity_check(20)")]
    orphans = [
        f"a row of {row['table']} refers to none of {row['parent']}" for row in store.rows("PRAGMA foreign_key_check")
    ]
    return [problem for problem in found if problem != "ok"] + orphans


def folders_named(store: Store) -> list[dict[str, Any]]:
    """The `folder` of each saved state, checkpoint and sampler, its `role`, and of `what`; but for those that are not
    made yet."""
    return store.rows(
        "SELECT restore_folder AS folder, 'newest' AS role, id AS what FROM runs WHERE restore_folder IS NOT NULL"
        " UNION SELECT former_folder, 'former', id FROM runs WHERE former_folder IS NOT NULL"
        " UNION SELECT folder, 'checkpoint', path FROM checkpoints"
        " UNION SELECT folder, 'sampler', id FROM samplers WHERE folder IS NOT NULL"
        "  AND folder NOT IN (SELECT folder FROM checkpoints)"
        " UNION SELECT commands.folder, 'loaded', runs.id FROM commands JOIN runs ON runs.id = commands.lane"
        "  WHERE commands.kind = 'load_state' AND commands.state = 'done' AND commands.seq > runs.former_seq"
        " ORDER BY what, role"
    )


def blobs_named(store: Store) -> list[dict[str, Any]]:
    """The `file` of each large payload and result, its `role`, and of `what` request."""
    return store.rows(
        "SELECT payload_file AS file, CASE state WHEN 'queued' THEN 'queued' ELSE 'replayed' END AS role,"
        "  future AS what FROM commands WHERE payload_file IS NOT NULL"
        " UNION SELECT payload_file, 'result', future FROM results WHERE payload_file IS NOT NULL ORDER BY what"
    )


def replays_without_payload(store: Store) -> list[dict[str, Any]]:
    """The `run` of each that its newest saved state and its journal cannot rebuild, and the `seq` that is missing."""
    return store.rows(
        "SELECT lane AS run, min(seq) AS seq FROM commands JOIN runs ON runs.id = lane WHERE seq > restore_seq"
        " AND state = 'done' AND commands.kind IN ('forward_backward', 'optim_step', 'load_state')"
        " AND payload IS NULL AND payload_file IS NULL GROUP BY lane"
    )


def queues(store: Store) -> list[dict[str, Any]]:
    return store.rows(
        "SELECT base_model, tenant, kind, count(*) AS commands, sum(tokens) AS tokens FROM commands"
        " WHERE state = 'queued' GROUP BY base_model, tenant, kind ORDER BY base_model, tenant, kind"
    )


def waiting(store: Store, wanted: JobsWanted) -> tuple[list[Job], int]:
    """What the journal holds as not over, and how many there are: for where no broker serves that knows more."""
    where = (
        " FROM commands LEFT JOIN samplers ON samplers.id = lane WHERE state = 'queued'"
        " AND (:tenant IS NULL OR commands.tenant = :tenant)"
        " AND (:base_model IS NULL OR commands.base_model = :base_model)"
        f" AND (:kind IS NULL OR kind = :kind) AND (:run IS NULL OR lane = :run OR {_RUN_OF_PATH} = :run)"
    )
    said = {name: getattr(wanted, name) for name in ("tenant", "base_model", "kind", "run")}
    rows = store.rows(
        "SELECT future, commands.tenant, commands.project, lane, commands.base_model, kind, tokens,"
        " submitted_at AS accepted_at,"
        f" CASE WHEN samplers.id IS NULL THEN lane ELSE {_RUN_OF_PATH} END AS run{where}"
        f" ORDER BY commands.rowid {'DESC' if wanted.newest else ''} LIMIT {wanted.limit}",
        **said,
    )
    (all_,) = store.rows(f"SELECT count(*) AS n{where}", **said)
    return [Job(**row, state="paused_capacity", reason=_NOBODY) for row in rows], all_["n"]


def requests_between(store: Store, base_model: str, start: float, end: float) -> list[dict[str, Any]]:
    """Passes and samples that succeeded and were submitted from `start` on, before `end`, in that order: lane, tenant,
    kind, how many rows or sequences, tokens by kind of usage, whether a step followed, the run's or the sampler's
    adapter.

    Of a run that was deleted nothing is left.
    """
    return store.rows(
        "SELECT commands.lane, commands.tenant, commands.kind, commands.rows, commands.submitted_at,"
        " (SELECT sum(tokens) FROM usage WHERE future = commands.future AND usage.kind = 'train') AS trained,"
        " (SELECT sum(tokens) FROM usage WHERE future = commands.future"
        "  AND usage.kind IN ('prefill', 'cached_prefill')) AS prompt,"
        " (SELECT sum(tokens) FROM usage WHERE future = commands.future AND usage.kind = 'sample') AS sampled,"
        " EXISTS (SELECT 1 FROM commands AS next WHERE next.lane = commands.lane AND next.seq = commands.seq + 1"
        "  AND next.kind = 'optim_step') AS step, runs.rank, runs.train_mlp, runs.train_attn,"
        " runs.train_unembed, samplers.id IS NOT NULL AND samplers.model_path IS NULL AS base"
        " FROM commands LEFT JOIN runs ON runs.id = commands.lane LEFT JOIN samplers ON samplers.id = commands.lane"
        " WHERE commands.base_model = ? AND commands.state = 'done' AND commands.kind IN ('forward_backward', 'sample')"
        " AND commands.submitted_at >= ? AND commands.submitted_at < ? ORDER BY commands.submitted_at",
        base_model,
        start,
        end,
    )
