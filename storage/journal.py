"""Commands and their results, large ones in files of their own."""

from collections.abc import Iterable
from dataclasses import astuple, fields
from typing import Any

from ..wire.catalogue_messages import Completed
from ..wire.client_messages import CommandArguments
from ..wire.codec import decode, encode
from ..wire.errors import JournalDamagedError
from ..wire.ids import ActorId, FutureId, LaneId, RunId
from .blobs import LARGE
from .connection import Connection, values_of
from .rows import CommandRow, CommandState, Execution, ResultRow, RunRow, UsageEntry, UsedSeq

_AWAKE_S = 60.0
"""A client that asks for something this long after it was told a result would have asked for that again by then, had it
not got it."""


class Journal(Connection):
    # Commands --------------------------------------------------------------------------------------------------------

    def command_accepted(self, command: CommandRow, payload: bytes, digest: bytes, now: float) -> UsedSeq | None:
        """What was accepted under this (lane, seq) before; nothing is changed then. `digest` says what was asked."""
        if self._db.execute("UPDATE runs SET last_request_at = ? WHERE id = ?", [now, command.lane]).rowcount == 0:
            self._db.execute("UPDATE samplers SET used_at = ? WHERE id = ?", [now, command.lane])
        if used := self.rows("SELECT kind, state, digest FROM commands WHERE future = ?", command.future):
            return UsedSeq(**used[0])
        kept, file = self._kept(payload)
        self._db.execute(
            "INSERT INTO commands (future, lane, seq, kind, tenant, base_model, tokens, rows, arguments,"
            " folder, payload, payload_file, digest, submitted_at, key, project, deadline, timeout_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
                kept,
                file,
                digest,
                now,
                command.key,
                command.project,
                command.deadline,
                command.timeout_s,
            ],
        )
        return None

    def command_finished(
        self,
        result: ResultRow,
        state: CommandState,
        actor: ActorId | None,
        usage: Iterable[UsageEntry],
        now: float,
        execution: Execution | None = None,
    ) -> None:
        """A completion is one fact: the state, the result and the usage are written in the caller's transaction."""
        started_at, attempts, device_s = astuple(execution) if execution is not None else (None, 0, None)
        self._db.execute(
            "UPDATE commands SET state = ?, actor = ?, finished_at = ?, started_at = ?, attempts = ?, device_s = ?"
            " WHERE future = ?",
            [state, actor, now, started_at, attempts, device_s, result.future],
        )
        kept, file = self._kept(result.payload)
        self._db.execute(
            "INSERT INTO results (future, error, payload, payload_file, payload_bytes, created_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            [result.future, result.error, kept, file, len(result.payload or b""), now],
        )
        for entry in usage:
            self._db.execute(
                "INSERT INTO usage (future, kind, tenant, run, base_model, tokens, price, cost, key, project, at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [*(values_of(entry).values()), now],
            )

    def folder_named(self, future: FutureId, folder: str | None) -> None:
        """Of a command that an older release accepted."""
        self._db.execute("UPDATE commands SET folder = ? WHERE future = ?", [folder, future])

    def payload_dropped(self, future: FutureId) -> None:
        self._drop_payloads("future = ?", future)

    def restore_points_set(self, run: RunRow) -> None:
        """Its points are what `run` says. The former one covers all commands up to its seq: should the newer fail, too,
        their payloads are needed no more."""
        (before,) = self.rows("SELECT former_seq FROM runs WHERE id = ?", run.id)
        self._drop_payloads("lane = ? AND seq <= ? AND seq > ?", run.id, run.former_seq, before["former_seq"])
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
        """Raises JournalDamagedError where it lies in a file that is damaged or gone."""
        rows = self.rows("SELECT payload, payload_file FROM commands WHERE future = ?", future)
        return (self._content(rows[0]["payload"], rows[0]["payload_file"]) if rows else None) or b""

    # Results ---------------------------------------------------------------------------------------------------------

    def result(self, future: FutureId) -> ResultRow | None:
        """One that lies in a file that is damaged or gone has failed."""
        question = "SELECT error, payload, payload_file FROM results WHERE future = ?"
        if not (rows := self.rows(question, future)):
            return None
        try:
            return ResultRow(future, rows[0]["error"], self._content(rows[0]["payload"], rows[0]["payload_file"]))
        except JournalDamagedError as error:
            # It may have expired between the row's reading and the file's.
            return ResultRow(future, encode(error.info), None) if self.rows(question, future) else None

    def results_told(self, futures: Iterable[FutureId], now: float) -> None:
        """Somebody was sent these."""
        self._db.conn.executemany("UPDATE results SET told_at = ? WHERE future = ?", [(now, f) for f in futures])

    def results_expired(self, before: float, read_before: float) -> None:
        """Drop those older than `before`; and those that were told before `read_before` and have been read: a client of
        their run, or of what shares its client session, was there later, or a newer sampler has taken their sampler's
        place.

        The newest stays, so that no rowid is ever used twice: they are the cursors of `completed_since`.
        """
        gone = self.rows(
            "WITH"
            " sampled(lane, session, run, at) AS (SELECT id, session,"
            "  substr(model_path, 10, instr(substr(model_path, 10), '/') - 1), used_at FROM samplers),"
            " seen(lane, at) AS (SELECT id, last_request_at FROM runs UNION ALL SELECT lane, max(at, coalesce("
            "  (SELECT max(last_request_at) FROM runs WHERE id = run OR runs.session = sampled.session), 0))"
            "  FROM sampled)"
            " SELECT results.future, results.payload_file FROM results"
            " LEFT JOIN commands ON commands.future = results.future LEFT JOIN seen ON seen.lane = commands.lane"
            " WHERE results.rowid < (SELECT max(rowid) FROM results) AND (results.created_at < ?"
            " OR results.told_at < ? AND (seen.at IS NULL OR seen.at > results.told_at + ?))",
            before,
            read_before,
            _AWAKE_S,
        )
        self._unnamed += [row["payload_file"] for row in gone if row["payload_file"]]
        self._db.conn.executemany("DELETE FROM results WHERE future = ?", [(row["future"],) for row in gone])

    def completed_since(self, lane: LaneId, low: int, high: int, cursor: int) -> tuple[list[Completed], int]:
        """What resolved after `cursor` of a lane's commands with seqs from `low` to below `high`; and the new cursor.

        From the start it walks the lane's commands; later, the few results that came since.
        """
        order = "commands CROSS JOIN results" if cursor == 0 else "results CROSS JOIN commands"
        rows = self.rows(
            f"SELECT results.rowid AS cursor, results.future, error IS NOT NULL AS failed,"
            f" coalesce(payload_bytes, length(results.payload)) AS n FROM {order} ON results.future = commands.future"
            " WHERE commands.lane = ? AND commands.seq >= ? AND commands.seq < ? AND results.rowid > ?"
            " ORDER BY results.rowid LIMIT 1000",
            lane,
            low,
            high,
            cursor,
        )
        found = [Completed(row["future"], bool(row["failed"]), row["n"] or 0) for row in rows]
        return found, rows[-1]["cursor"] if rows else cursor

    # Files -----------------------------------------------------------------------------------------------------------

    def blobs_named(self) -> set[str]:
        """The files that a row names."""
        rows = self.rows(
            "SELECT payload_file AS name FROM commands WHERE payload_file IS NOT NULL"
            " UNION ALL SELECT payload_file FROM results WHERE payload_file IS NOT NULL"
        )
        return {row["name"] for row in rows}

    def blobs_swept(self) -> None:
        """Delete the files that no row names. Only where nothing else writes: between two transactions of the one
        writer."""
        self._unnamed += self._blobs.names() - self.blobs_named()

    def _kept(self, content: bytes | None) -> tuple[bytes | None, str | None]:
        """What the row holds, and the file that it names instead."""
        if content is None or len(content) <= LARGE:
            return content, None
        return None, self._blobs.write(content)

    def _content(self, kept: bytes | None, file: str | None) -> bytes | None:
        return self._blobs.read(file) if file is not None else kept

    def _drop_payloads(self, where: str, *values: object) -> None:
        rows = self.rows(f"SELECT payload_file FROM commands WHERE payload_file IS NOT NULL AND {where}", *values)
        self._unnamed += [row["payload_file"] for row in rows]
        self._db.execute(f"UPDATE commands SET payload = NULL, payload_file = NULL WHERE {where}", values)


_UNKEPT = ("arguments", "prefix", "accepted_at", "traceparent")
_KEPT = tuple(field.name for field in fields(CommandRow) if field.name not in _UNKEPT)


def _command(row: dict[str, Any]) -> CommandRow:
    arguments = decode(row["arguments"], CommandArguments)
    return CommandRow(**{name: row[name] for name in _KEPT}, arguments=arguments, accepted_at=row["submitted_at"])
