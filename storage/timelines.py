"""When commands were accepted, handed out and finished, of a client session or a run, a page at a time."""

import json
from typing import Any

from ..wire.codec import decode
from ..wire.errors import ErrorInfo
from ..wire.ids import LaneId, RunId, TenantId
from ..wire.timelines import PAGE, FailedCommand, Place, TimedCommand, Timeline
from .store import Store

_RUN_OF_PATH = "substr(model_path, 10, instr(substr(model_path, 10), '/') - 1)"

FAILURES = (
    "SELECT finished_at AS at, seq, kind, error FROM commands JOIN results ON results.future = commands.future"
    " WHERE lane = ? AND state IN ('failed', 'discarded') AND error IS NOT NULL ORDER BY seq DESC LIMIT ?"
)


def timeline(store: Store, tenant: TenantId, subject: str, after: Place | None, most: int = PAGE) -> Timeline:
    """Of what `tenant` made in the client session `subject`, or of its run of this name, with samplers of the weights
    of either. Up to `most` commands, by lane and seq, that come behind `after`."""
    found: list[TimedCommand] = []
    for lane in _lanes(store, tenant, subject):
        if after is not None and lane["id"] < after.lane:
            continue
        seq = after.seq if after is not None and lane["id"] == after.lane else -1
        found += [_told(row, lane["run"]) for row in _commands(store, lane["id"], seq, most - len(found))]
        if len(found) == most:
            return Timeline(found, Place(LaneId(found[-1].lane), found[-1].seq))
    return Timeline(found, None)


def owner(store: Store, subject: str) -> TenantId | None:
    """Whose client session or run it is, None where there is none."""
    for table in ("client_sessions", "runs"):
        if rows := store.rows(f"SELECT tenant FROM {table} WHERE id = ?", subject):
            return TenantId(rows[0]["tenant"])
    return None


def failures(store: Store, run: RunId, most: int = 20) -> list[FailedCommand]:
    """The newest first, of those whose error is still kept."""
    return [_failure(row) for row in store.rows(FAILURES, run, most)]


def _failure(row: dict[str, Any]) -> FailedCommand:
    error = decode(row["error"], ErrorInfo)
    return FailedCommand(row["at"], row["seq"], row["kind"], error.code, error.message)


def _lanes(store: Store, tenant: TenantId, subject: str) -> list[dict[str, Any]]:
    return store.rows(
        "WITH own(id) AS (SELECT id FROM runs WHERE tenant = ?1 AND (session = ?2 OR id = ?2))"
        " SELECT id, id AS run FROM own UNION ALL"
        f" SELECT id, {_RUN_OF_PATH} AS run FROM samplers"
        f" WHERE tenant = ?1 AND (session = ?2 OR {_RUN_OF_PATH} IN own) ORDER BY id",
        tenant,
        subject,
    )


def _commands(store: Store, lane: str, after: int, most: int) -> list[dict[str, Any]]:
    return store.rows(
        "SELECT commands.future, lane, seq, kind, base_model, state, actor, submitted_at AS accepted_at, started_at,"
        " finished_at, attempts, device_s, error,"
        " (SELECT json_group_object(used.kind, used.tokens) FROM usage AS used WHERE used.future = commands.future)"
        " AS tokens"
        " FROM commands LEFT JOIN results ON results.future = commands.future"
        " WHERE lane = ? AND seq > ? ORDER BY seq LIMIT ?",
        lane,
        after,
        most,
    )


def _told(row: dict[str, Any], run: str | None) -> TimedCommand:
    error = None if row["error"] is None else decode(row["error"], ErrorInfo).code
    told: dict[str, Any] = row | {"run": run or None, "tokens": json.loads(row["tokens"]), "error": error}
    return TimedCommand(**told)
