"""The SQL that there is, but for `reports`. Synchronous.

The writer thread and the readers each have a Store on a connection of their own.

Nothing here decides anything: methods are named for what they record or answer.
"""

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
from sqlite_utils import Database

from ..wire.actor_messages import ActorPing
from ..wire.catalogue_messages import Completed
from ..wire.client_messages import CommandArguments
from ..wire.codec import decode, encode
from ..wire.ids import ActorId, FutureId, KeyHash, LaneId, RunId, TenantId
from ..wire.types import LoraConfig
from .rows import (
    ActorRow,
    CheckpointRow,
    ClientSessionRow,
    CommandRow,
    CommandState,
    ResultRow,
    RunRow,
    SamplerRow,
    UsageEntry,
    UsedSeq,
)
from .schema import migrations

FILE = "lorry.db"
_FOLDERS_IN_USE = (
    "SELECT folder FROM checkpoints UNION ALL SELECT folder FROM samplers"
    " UNION ALL SELECT restore_folder FROM runs UNION ALL SELECT former_folder FROM runs"
    " UNION ALL SELECT snapshot_folder FROM runs"
    " UNION ALL SELECT commands.folder FROM commands JOIN runs ON runs.id = commands.lane"
    " WHERE commands.folder IS NOT NULL AND (commands.state = 'queued'"
    " OR commands.kind = 'load_state' AND commands.state = 'done' AND commands.seq > runs.former_seq)"
)


class Store:
    """One connection to the database in `folder`, which is made, and migrated, where it does not exist."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(folder / FILE, isolation_level=None, check_same_thread=False, timeout=30)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        self._db = Database(connection)
        if migrations.pending(self._db):
            migrations.apply(self._db)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Generator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def rows(self, sql: str, *values: object) -> list[dict[str, Any]]:
        """For this package's own questions."""
        return list(self._db.query(sql, values))

    # Tenants and keys ------------------------------------------------------------------------------------------------

    def create_key(self, tenant: TenantId, now: float) -> str:
        """A new key of `tenant`, who is made if new. Only its hash is kept, so this is the one time it can be seen."""
        key = "tml-" + secrets.token_urlsafe(32)
        with self.transaction():
            self._db.table("tenants").insert({"id": tenant, "created_at": now}, ignore=True)
            self._db.table("api_keys").insert({"hash": key_hash(key), "tenant": tenant, "created_at": now})
        return key

    def tenant_of(self, key: KeyHash) -> TenantId | None:
        """A key has 256 random bits: one SHA-256 is as good as a slow hash, and the index look-up leaks nothing."""
        rows = self.rows("SELECT tenant FROM api_keys WHERE hash = ?", key)
        return TenantId(rows[0]["tenant"]) if rows else None

    def key_deleted(self, key: KeyHash) -> None:
        self._db.execute("DELETE FROM api_keys WHERE hash = ?", [key])

    def client_events_counted(self, tenant: TenantId, events: int, failures: int) -> None:
        self._db.execute(
            "UPDATE tenants SET client_events = client_events + ?, client_failures = client_failures + ? WHERE id = ?",
            [events, failures, tenant],
        )

    def token_secret(self) -> bytes:
        """What signs the tokens that stand for keys; made once, so that they outlive a restart."""
        with self.transaction():
            if not (rows := self.rows("SELECT secret FROM secrets WHERE name = 'tokens'")):
                self._db.table("secrets").insert({"name": "tokens", "secret": secrets.token_bytes(32)})
                rows = self.rows("SELECT secret FROM secrets WHERE name = 'tokens'")
        return rows[0]["secret"]

    # Sessions, actors, events ----------------------------------------------------------------------------------------

    def session_started(self, session: str, tenant: TenantId, client: str, now: float) -> None:
        self._db.table("sessions").insert({"id": session, "tenant": tenant, "client": client, "started_at": now})

    def session_ended(self, session: str, now: float) -> None:
        self._db.execute("UPDATE sessions SET ended_at = ? WHERE id = ?", [now, session])

    def actor_started(self, actor: ActorRow) -> None:
        self._db.table("actors").insert(_values(actor), replace=True)

    def actor_measured(self, actor: ActorId, ping: ActorPing) -> None:
        self._db.execute(
            "UPDATE actors SET train_s = ?, sample_s = ?, swaps = ? WHERE id = ?",
            [ping.train_s, ping.sample_s, ping.swaps, actor],
        )

    def actor_ended(self, actor: ActorId, state: str, now: float) -> None:
        self._db.execute("UPDATE actors SET state = ?, ended_at = ? WHERE id = ?", [state, now, actor])

    def all_actors_ended(self, now: float) -> None:
        self._db.execute("UPDATE actors SET state = 'stopped', ended_at = ? WHERE state = 'ready'", [now])

    def record_event(self, kind: str, subject: str, detail: str, now: float) -> None:
        self._db.table("events").insert({"at": now, "kind": kind, "subject": subject, "detail": detail})

    # Runs and samplers -----------------------------------------------------------------------------------------------

    def run_created(self, run: RunRow) -> None:
        values = _values(run) | msgspec.to_builtins(run.lora) | {"user_metadata": json.dumps(run.user_metadata)}
        del values["lora"]
        self._db.table("runs").insert(values)

    def runs(self) -> list[RunRow]:
        return [_run(row) for row in self.rows("SELECT * FROM runs")]

    def sampler_created(self, sampler: SamplerRow) -> None:
        self._db.table("samplers").insert(_values(sampler) | {"used_at": sampler.created_at}, ignore=True)

    def samplers(self) -> list[SamplerRow]:
        names = ", ".join(field.name for field in fields(SamplerRow))
        return [SamplerRow(**row) for row in self.rows(f"SELECT {names} FROM samplers")]

    def samplers_expired(self, before: float) -> list[str]:
        """Forget those of weights that no checkpoint's name leads to, that nobody has used since `before`, and that
        nothing waits for."""
        gone = self.rows(
            "DELETE FROM samplers WHERE folder IS NOT NULL AND used_at < ?"
            " AND folder NOT IN (SELECT folder FROM checkpoints)"
            " AND NOT EXISTS (SELECT 1 FROM commands WHERE lane = samplers.id AND state = 'queued') RETURNING id",
            before,
        )
        return [row["id"] for row in gone]

    def sampler_joined(self, sampler: str, clients: int) -> None:
        self._db.execute("UPDATE samplers SET clients = ? WHERE id = ?", [clients, sampler])

    # Client sessions -------------------------------------------------------------------------------------------------

    def client_session_created(self, session: ClientSessionRow) -> None:
        values = _values(session) | {
            "tags": json.dumps(session.tags),
            "user_metadata": json.dumps(session.user_metadata),
        }
        self._db.table("client_sessions").insert(values)

    def client_session_finished(self, session: str, reason: str, detail: str | None) -> None:
        self._db.execute("UPDATE client_sessions SET reason = ?, detail = ? WHERE id = ?", [reason, detail, session])

    def client_sessions(self) -> list[ClientSessionRow]:
        rows = self.rows("SELECT * FROM client_sessions ORDER BY created_at")
        parsed = ({"tags": json.loads(row["tags"]), "user_metadata": json.loads(row["user_metadata"])} for row in rows)
        return [ClientSessionRow(**(row | values)) for row, values in zip(rows, parsed, strict=True)]

    # Commands --------------------------------------------------------------------------------------------------------

    def command_accepted(self, command: CommandRow, payload: bytes, digest: bytes, now: float) -> UsedSeq | None:
        """What was accepted under this (lane, seq) before; nothing is changed then. `digest` says what was asked."""
        cursor = self._db.execute(
            "INSERT OR IGNORE INTO commands (future, lane, seq, kind, tenant, base_model, tokens, rows, arguments,"
            " folder, payload, digest, submitted_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                command.future,
                command.lane,
                command.seq,
                command.kind,
                command.tenant,
                command.base_model,
                command.tokens,
                command.rows,
                encode(command.arguments),
                command.folder,
                payload,
                digest,
                now,
            ],
        )
        if self._db.execute("UPDATE runs SET last_request_at = ? WHERE id = ?", [now, command.lane]).rowcount == 0:
            self._db.execute("UPDATE samplers SET used_at = ? WHERE id = ?", [now, command.lane])
        if cursor.rowcount == 1:
            return None
        (used,) = self.rows("SELECT kind, state, digest FROM commands WHERE future = ?", command.future)
        return UsedSeq(**used)

    def command_finished(
        self, result: ResultRow, state: CommandState, actor: ActorId | None, usage: Iterable[UsageEntry], now: float
    ) -> None:
        """A completion is one fact: the state, the result and the usage are written in the caller's transaction."""
        self._db.execute(
            "UPDATE commands SET state = ?, actor = ?, finished_at = ? WHERE future = ?",
            [state, actor, now, result.future],
        )
        self._db.execute(
            "INSERT INTO results (future, error, payload, created_at) VALUES (?, ?, ?, ?)",
            [result.future, result.error, result.payload, now],
        )
        for entry in usage:
            self._db.execute(
                "INSERT INTO usage (future, kind, tenant, run, base_model, tokens, price, cost, at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [*(_values(entry).values()), now],
            )

    def folder_named(self, future: FutureId, folder: str | None) -> None:
        """Of a command that an older release accepted."""
        self._db.execute("UPDATE commands SET folder = ? WHERE future = ?", [folder, future])

    def payload_dropped(self, future: FutureId) -> None:
        self._db.execute("UPDATE commands SET payload = NULL WHERE future = ?", [future])

    def restore_points_set(self, run: RunRow) -> None:
        """Its points are what `run` says. The former one covers all commands up to its seq: should the newer fail, too,
        their payloads are needed no more."""
        self._db.execute(
            "UPDATE commands SET payload = NULL WHERE lane = ? AND seq <= ?"
            " AND seq > (SELECT former_seq FROM runs WHERE id = ?)",
            [run.id, run.former_seq, run.id],
        )
        names = ("restore_folder", "restore_seq", "former_folder", "former_seq", "snapshot_folder", "replay_s")
        assignments = ", ".join(f"{name} = ?" for name in names)
        self._db.execute(f"UPDATE runs SET {assignments} WHERE id = ?", [*(getattr(run, n) for n in names), run.id])

    def replay_measured(self, run: RunId, replay_s: float) -> None:
        self._db.execute("UPDATE runs SET replay_s = ? WHERE id = ?", [replay_s, run])

    def queued_commands(self) -> list[CommandRow]:
        return [_command(row) for row in self.rows("SELECT * FROM commands WHERE state = 'queued' ORDER BY rowid")]

    def finished_counts(self) -> dict[LaneId, tuple[int, int]]:
        """For each lane how many commands are over, and the highest of their seqs, which start at 0."""
        rows = self.rows(
            "SELECT lane, count(*) AS n, max(seq) AS top FROM commands WHERE state != 'queued' GROUP BY lane"
        )
        return {LaneId(row["lane"]): (row["n"], row["top"]) for row in rows}

    def finished_seqs(self, lane: LaneId) -> list[int]:
        rows = self.rows("SELECT seq FROM commands WHERE lane = ? AND state != 'queued' ORDER BY seq", lane)
        return [row["seq"] for row in rows]

    def replayable_commands(self, run: RunId, after: int, before: int) -> list[CommandRow]:
        """What changed a run's state between two seqs, in order: neither a save nor a pure forward, and nothing that
        failed but for what dropped a gradient."""
        rows = self.rows(
            "SELECT * FROM commands WHERE lane = ? AND seq > ? AND seq < ? AND state IN ('done', 'discarded')"
            " AND kind IN ('forward_backward', 'optim_step', 'load_state') ORDER BY seq",
            run,
            after,
            before,
        )
        return [_command(row) for row in rows]

    def payload(self, future: FutureId) -> bytes:
        rows = self.rows("SELECT payload FROM commands WHERE future = ?", future)
        return rows[0]["payload"] or b"" if rows else b""

    def result(self, future: FutureId) -> ResultRow | None:
        rows = self.rows("SELECT future, error, payload FROM results WHERE future = ?", future)
        return ResultRow(**rows[0]) if rows else None

    def results_expired(self, before: float) -> None:
        """The newest stays, so that no rowid is ever used twice: they are the cursors of `completed_since`."""
        newest = "(SELECT max(rowid) FROM results)"
        self._db.execute(f"DELETE FROM results WHERE created_at < ? AND rowid < {newest}", [before])

    def completed_since(self, lane: LaneId, low: int, high: int, cursor: int) -> tuple[list[Completed], int]:
        """What resolved after `cursor` of a lane's commands with seqs from `low` to below `high`; and the new cursor.

        From the start it walks the lane's commands; later, the few results that came since.
        """
        order = "commands CROSS JOIN results" if cursor == 0 else "results CROSS JOIN commands"
        rows = self.rows(
            f"SELECT results.rowid AS cursor, results.future, error IS NOT NULL AS failed, length(results.payload) AS n"
            f" FROM {order} ON results.future = commands.future"
            " WHERE commands.lane = ? AND commands.seq >= ? AND commands.seq < ? AND results.rowid > ?"
            " ORDER BY results.rowid LIMIT 1000",
            lane,
            low,
            high,
            cursor,
        )
        found = [Completed(row["future"], bool(row["failed"]), row["n"] or 0) for row in rows]
        return found, rows[-1]["cursor"] if rows else cursor

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def checkpoint_saved(self, checkpoint: CheckpointRow) -> None:
        """Made, or changed."""
        values = _values(checkpoint) | {"user_metadata": json.dumps(checkpoint.user_metadata)}
        self._db.table("checkpoints").insert(values, replace=True)

    def checkpoint_deleted(self, checkpoint: CheckpointRow) -> None:
        """Unless another has taken its name since."""
        self._db.execute("DELETE FROM checkpoints WHERE path = ? AND folder = ?", [checkpoint.path, checkpoint.folder])

    def checkpoints(self) -> list[CheckpointRow]:
        return [_checkpoint(row) for row in self.rows("SELECT * FROM checkpoints")]

    def folders_in_use(self) -> set[str]:
        """What anything may still need: a name leads to it, a run is rebuilt from it, a sampler samples it, or a
        command writes it, reads it, or would read it again in a replay."""
        return {row["folder"] for row in self.rows(f"{_FOLDERS_IN_USE}") if row["folder"] is not None}

    def folder_is_in_use(self, folder: str) -> bool:
        return bool(self.rows(f"SELECT 1 FROM ({_FOLDERS_IN_USE}) WHERE folder = ? LIMIT 1", folder))


def key_hash(key: str) -> KeyHash:
    return KeyHash(hashlib.sha256(key.encode()).hexdigest())


def _values(row: Any) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row)}


def _run(row: dict[str, Any]) -> RunRow:
    lora = LoraConfig(
        rank=row["rank"],
        seed=row["seed"],
        train_mlp=bool(row["train_mlp"]),
        train_attn=bool(row["train_attn"]),
        train_unembed=bool(row["train_unembed"]),
    )
    values = {field.name: row[field.name] for field in fields(RunRow) if field.name not in ("lora", "user_metadata")}
    return RunRow(**values, lora=lora, user_metadata=json.loads(row["user_metadata"]))


def _checkpoint(row: dict[str, Any]) -> CheckpointRow:
    parsed: dict[str, Any] = {name: bool(row[name]) for name in ("public", "ephemeral")}
    parsed["user_metadata"] = json.loads(row["user_metadata"])
    return CheckpointRow(**(row | parsed))


def _command(row: dict[str, Any]) -> CommandRow:
    names = ("future", "lane", "seq", "kind", "tenant", "base_model", "tokens", "rows", "folder", "state")
    return CommandRow(**{n: row[n] for n in names}, arguments=decode(row["arguments"], CommandArguments))
