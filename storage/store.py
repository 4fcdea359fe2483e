"""All that is written down, but for the journal's half of it. Synchronous.

The writer thread and the readers each have a Store on a connection of their own.

Nothing here decides anything: methods are named for what they record or answer.
"""

import json
import secrets
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from ..wire.actor_messages import ActorPing
from ..wire.ids import ActorId, RunId, TenantId
from ..wire.types import LoraConfig
from .audit import Audit
from .checkpoints import place_of
from .connection import values_of
from .journal import Journal
from .keys import Keys
from .metrics import Metrics
from .projects import Projects
from .rows import ActorRow, CheckpointRow, ClientSessionRow, RunRow, SamplerRow

_FOLDERS_IN_USE = (
    "SELECT folder FROM checkpoints UNION ALL SELECT folder FROM samplers"
    " UNION ALL SELECT restore_folder FROM runs UNION ALL SELECT former_folder FROM runs"
    " UNION ALL SELECT snapshot_folder FROM runs"
    " UNION ALL SELECT commands.folder FROM commands LEFT JOIN runs ON runs.id = commands.lane"
    " WHERE commands.folder IS NOT NULL AND (commands.state = 'queued'"
    " OR commands.kind = 'load_state' AND commands.state = 'done' AND commands.seq > runs.former_seq)"
)


_FOLDER_COLUMNS = (
    ("checkpoints", "folder"),
    ("samplers", "folder"),
    ("commands", "folder"),
    ("runs", "restore_folder"),
    ("runs", "former_folder"),
    ("runs", "snapshot_folder"),
)


class Store(Journal, Keys, Projects, Audit, Metrics):
    """`Connection` says how it is opened, `Journal` what becomes of commands, `Keys` who may come in, `Projects` what
    they work on and what is kept of it (`Keeping`), `Audit` who did what, and `Metrics` which numbers it came to."""

    # Clients' events and tokens ---------------------------------------------------------------------------------------

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
        self._db.table("actors").insert(values_of(actor), replace=True)

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
        values = values_of(run) | _shape(run.lora) | {"user_metadata": json.dumps(run.user_metadata)}
        del values["lora"]
        self._db.table("runs").insert(values)

    def run_shaped(self, run: RunRow) -> None:
        """Its adapter has another shape, before it was ever made."""
        self._db.execute(
            "UPDATE runs SET alpha = :alpha, target_modules = :target_modules, expert_lora = :expert_lora"
            " WHERE id = :id",
            {**_shape(run.lora), "id": run.id},
        )

    def runs(self) -> list[RunRow]:
        return [_run(row) for row in self.rows("SELECT * FROM runs")]

    def sampler_created(self, sampler: SamplerRow) -> None:
        self._db.table("samplers").insert(values_of(sampler) | {"used_at": sampler.created_at}, ignore=True)

    def sampler_moved(self, sampler: SamplerRow) -> None:
        """It has other weights now."""
        values = {"id": sampler.id, "path": sampler.model_path, "folder": sampler.folder}
        self._db.execute(
            "UPDATE samplers SET model_path = :path, folder = :folder, outlived = 0 WHERE id = :id", values
        )

    def samplers(self) -> list[SamplerRow]:
        names = ", ".join(field.name for field in fields(SamplerRow))
        rows = self.rows(f"SELECT {names} FROM samplers")
        flags = ("outlived", "in_flight")
        parsed: list[dict[str, Any]] = [{flag: bool(row[flag]) for flag in flags} for row in rows]
        return [SamplerRow(**(row | values)) for row, values in zip(rows, parsed, strict=True)]

    def samplers_outlived(self, run: RunId, newest: int, before: float) -> tuple[list[str], list[CheckpointRow]]:
        """Weights without a name are gone where the run has saved `newest` since that are newer, nobody has asked a
        sampler of theirs since the first of those, nor since `before`, and nothing waits for one: the samplers that
        have none now, and what the weights were saved as."""
        rows = self.rows(
            "WITH first(seq, at) AS (SELECT seq, created_at FROM checkpoints WHERE run = :run AND ephemeral"
            "  ORDER BY seq DESC LIMIT 1 OFFSET :newest - 1)"
            " SELECT checkpoints.* FROM checkpoints JOIN first WHERE run = :run AND ephemeral AND NOT public"
            " AND checkpoints.seq < first.seq AND checkpoints.created_at < min(:before, first.at) AND NOT EXISTS ("
            "  SELECT 1 FROM samplers WHERE samplers.folder = checkpoints.folder AND ("
            "   used_at >= min(:before, first.at)"
            "   OR EXISTS (SELECT 1 FROM commands WHERE lane = samplers.id AND state = 'queued')))",
            run=run,
            newest=newest,
            before=before,
        )
        outlived = [_checkpoint(row) for row in rows]
        samplers: list[str] = []
        for checkpoint in outlived:
            self._db.execute("DELETE FROM checkpoints WHERE path = ?", [checkpoint.path])
            gone = "UPDATE samplers SET outlived = 1, folder = NULL WHERE folder = ? RETURNING id"
            samplers += [row["id"] for row in self.rows(gone, checkpoint.folder)]
        return samplers, outlived

    def samplers_expired(self, before: float) -> list[str]:
        """Forget those of weights that no checkpoint's name leads to, that nobody has used since `before`, and that
        nothing waits for."""
        gone = self.rows(
            "DELETE FROM samplers WHERE (folder IS NOT NULL OR outlived) AND used_at < ?"
            " AND (outlived OR folder NOT IN (SELECT folder FROM checkpoints))"
            " AND NOT EXISTS (SELECT 1 FROM commands WHERE lane = samplers.id AND state = 'queued') RETURNING id",
            before,
        )
        return [row["id"] for row in gone]

    def sampler_joined(self, sampler: str, clients: int) -> None:
        self._db.execute("UPDATE samplers SET clients = ? WHERE id = ?", [clients, sampler])

    # Client sessions -------------------------------------------------------------------------------------------------

    def client_session_created(self, session: ClientSessionRow) -> None:
        values = values_of(session) | {
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

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def checkpoint_saved(self, checkpoint: CheckpointRow) -> None:
        values = values_of(checkpoint) | {"user_metadata": json.dumps(checkpoint.user_metadata)}
        self._db.table("checkpoints").insert(values, replace=True)
        if not checkpoint.ephemeral:
            self._keep(checkpoint, checkpoint.created_at)

    def checkpoint_changed(self, checkpoint: CheckpointRow, now: float) -> bool:
        """How long it lives, and who may read it. False where it is there no more, or another has taken its name."""
        was = self.rows("SELECT ephemeral FROM checkpoints WHERE path = ?", checkpoint.path)
        changed = (
            "UPDATE checkpoints SET expires_at = :expires_at, public = :public, ephemeral = :ephemeral"
            " WHERE path = :path AND folder = :folder RETURNING path"
        )
        if not self.rows(changed, **values_of(checkpoint)):
            return False
        if was[0]["ephemeral"] and not checkpoint.ephemeral:
            self._keep(checkpoint, now)
        self._expire(checkpoint)
        return True

    def checkpoint_deleted(self, checkpoint: CheckpointRow, now: float) -> None:
        """Unless another has taken its name since. One that expired was kept until then."""
        gone = "DELETE FROM checkpoints WHERE path = ? AND folder = ? RETURNING path"
        if self.rows(gone, checkpoint.path, checkpoint.folder):
            self._let_go(checkpoint.path, now if checkpoint.expires_at is None else min(now, checkpoint.expires_at))

    def checkpoints(self) -> list[CheckpointRow]:
        return [_checkpoint(row) for row in self.rows("SELECT * FROM checkpoints")]

    def moved_to(self, root: Path) -> None:
        """Folders lie below `root` now, wherever they lay when they were named."""
        if self.rows("SELECT 1 FROM folders_root WHERE root = ?", str(root)):
            return
        for table, column in _FOLDER_COLUMNS:
            for row in self.rows(f"SELECT DISTINCT {column} AS folder FROM {table} WHERE {column} IS NOT NULL"):
                folder = str(root.joinpath(*place_of(Path(row["folder"]))))
                if folder != row["folder"]:
                    self._db.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", [folder, row["folder"]])
        self._db.execute("DELETE FROM folders_root")
        self._db.execute("INSERT INTO folders_root (root) VALUES (?)", [str(root)])

    def folders_in_use(self) -> set[str]:
        """What anything may still need: a name leads to it, a run is rebuilt from it, a sampler samples it, or a
        command writes it, reads it, or would read it again in a replay."""
        return {row["folder"] for row in self.rows(f"{_FOLDERS_IN_USE}") if row["folder"] is not None}

    def folder_is_in_use(self, folder: str) -> bool:
        return bool(self.rows(f"SELECT 1 FROM ({_FOLDERS_IN_USE}) WHERE folder = ? LIMIT 1", folder))


def _shape(lora: LoraConfig) -> dict[str, Any]:
    names = lora.target_modules
    return msgspec.to_builtins(lora) | {"target_modules": None if names is None else json.dumps(names)}


def _run(row: dict[str, Any]) -> RunRow:
    lora = LoraConfig(
        rank=row["rank"],
        seed=row["seed"],
        train_mlp=bool(row["train_mlp"]),
        train_attn=bool(row["train_attn"]),
        train_unembed=bool(row["train_unembed"]),
        expert_lora=row["expert_lora"],
        alpha=row["alpha"],
        target_modules=None if row["target_modules"] is None else json.loads(row["target_modules"]),
    )
    values = {field.name: row[field.name] for field in fields(RunRow) if field.name not in ("lora", "user_metadata")}
    return RunRow(**values, lora=lora, user_metadata=json.loads(row["user_metadata"]))


def _checkpoint(row: dict[str, Any]) -> CheckpointRow:
    parsed: dict[str, Any] = {name: bool(row[name]) for name in ("public", "ephemeral")}
    parsed["user_metadata"] = json.loads(row["user_metadata"])
    return CheckpointRow(**(row | parsed))
