"""The schema, as migrations that sqlite-utils applies in order and records. A released migration never changes."""

from contextlib import closing

from sqlite_utils import Database, Migrations

from ..wire.client_messages import CommandArguments
from ..wire.codec import decode

migrations = Migrations("lorry")


def missing(db: Database) -> list[str]:
    """The migrations that an older release did not know."""
    return [migration.name for migration in migrations.pending(db)]


def unknown(db: Database) -> list[str]:
    """The migrations of a newer release."""
    with closing(Database(memory=True)) as empty:
        known = {migration.name for migration in migrations.pending(empty)}
    return [migration.name for migration in migrations.applied(db) if migration.name not in known]


@migrations()
def m001_first_light(db: Database) -> None:
    db.table("tenants").create({"id": str, "created_at": float}, pk="id")
    db.table("api_keys").create(
        {"hash": str, "tenant": str, "created_at": float},
        pk="hash",
        foreign_keys=[("tenant", "tenants", "id")],
        not_null=("tenant",),
    )
    db.table("sessions").create(
        {"id": str, "tenant": str, "client": str, "started_at": float, "ended_at": float}, pk="id"
    )
    db.table("runs").create(
        {
            "id": str,
            "tenant": str,
            "nonce": str,
            "base_model": str,
            "rank": int,
            "seed": int,
            "train_mlp": int,
            "train_attn": int,
            "train_unembed": int,
            "user_metadata": str,
            "created_at": float,
            "last_request_at": float,
            # The newest training state that was saved, and the last command it covers: where a replay starts.
            "restore_folder": str,
            "restore_seq": int,
        },
        pk="id",
        foreign_keys=[("tenant", "tenants", "id")],
    )
    db.table("runs").create_index(["tenant", "nonce"], unique=True)
    db.table("commands").create(
        {
            "future": str,
            "lane": str,
            "seq": int,
            "kind": str,
            "tenant": str,
            "base_model": str,
            "tokens": int,
            "rows": int,
            "arguments": bytes,
            "payload": bytes,
            "state": str,
            "actor": str,
            "submitted_at": float,
            "finished_at": float,
        },
        pk="future",
        defaults={"state": "queued"},
    )
    db.table("commands").create_index(["lane", "seq"], unique=True)
    db.execute("CREATE INDEX commands_queued ON commands (base_model) WHERE state = 'queued'")
    db.table("results").create(
        {"future": str, "error": bytes, "payload": bytes, "created_at": float},
        pk="future",
        foreign_keys=[("future", "commands", "future")],
    )
    db.table("results").create_index(["created_at"])
    db.table("checkpoints").create(
        {
            "path": str,
            "run": str,
            "tenant": str,
            "kind": str,
            "name": str,
            "folder": str,
            "seq": int,
            "size_bytes": int,
            "checksum": str,
            "created_at": float,
            "expires_at": float,
        },
        pk="path",
        foreign_keys=[("run", "runs", "id")],
    )
    db.table("checkpoints").create_index(["tenant"])
    db.table("samplers").create(
        {"id": str, "tenant": str, "nonce": str, "base_model": str, "model_path": str, "created_at": float},
        pk="id",
        foreign_keys=[("tenant", "tenants", "id")],
    )
    db.table("samplers").create_index(["tenant", "nonce"], unique=True)
    db.table("usage").create(
        {"future": str, "kind": str, "tenant": str, "run": str, "base_model": str, "tokens": int, "at": float},
        pk=("future", "kind"),
    )
    db.table("usage").create_index(["tenant"])
    db.table("actors").create(
        {
            "id": str,
            "base_model": str,
            "pid": int,
            "device": str,
            "dtype": str,
            "slots": int,
            "state": str,
            "started_at": float,
            "ended_at": float,
            "busy_s": float,
            "swaps": int,
        },
        pk="id",
    )
    db.table("events").create(
        {"id": int, "at": float, "kind": str, "subject": str, "detail": str},
        pk="id",
    )


@migrations()
def m002_client_sessions(db: Database) -> None:
    db.table("client_sessions").create(
        {
            "id": str,
            "tenant": str,
            "client": str,
            "tags": str,
            "user_metadata": str,
            "display_name": str,
            "created_at": float,
            "reason": str,
            "detail": str,
        },
        pk="id",
        foreign_keys=[("tenant", "tenants", "id")],
    )
    db.table("secrets").create({"name": str, "secret": bytes}, pk="name")
    db.table("runs").add_column("session", str)
    db.table("runs").add_column("first_seq", int, not_null_default=0)
    db.table("samplers").add_column("session", str)
    db.table("samplers").add_column("clients", int, not_null_default=0)
    db.table("checkpoints").add_column("public", int, not_null_default=0)
    db.table("checkpoints").add_column("ephemeral", int, not_null_default=0)
    db.table("checkpoints").add_column("user_metadata", str, not_null_default="{}")


@migrations()
def m003_counts_and_prices(db: Database) -> None:
    # What the tenant's programs reported of themselves: how many events, and how many of them were failures.
    db.table("tenants").add_column("client_events", int, not_null_default=0)
    db.table("tenants").add_column("client_failures", int, not_null_default=0)
    # Micro-dollars per million tokens when the tokens were used, and what they cost in millionths of a micro-dollar.
    db.table("usage").add_column("price", int, not_null_default=0)
    db.table("usage").add_column("cost", int, not_null_default=0)


@migrations()
def m004_split_of_busy_time(db: Database) -> None:
    db.table("actors").add_column("train_s", float)
    db.table("actors").add_column("sample_s", float)
    db.table("actors").add_column("sample_share", float)
    db.execute("ALTER TABLE actors DROP COLUMN busy_s")  # the sum of the two


@migrations()
def m005_names_are_resolved_once(db: Database) -> None:
    # What a save writes and a load reads, and what a sampler samples: folders, looked up when they were accepted.
    db.table("commands").add_column("folder", str)
    db.table("samplers").add_column("folder", str)
    # What the request said, so that another one under the same seq is noticed.
    db.table("commands").add_column("digest", bytes)
    db.table("samplers").add_column("used_at", float)
    db.execute("UPDATE samplers SET used_at = created_at")
    db.execute("UPDATE samplers SET folder = (SELECT folder FROM checkpoints WHERE path = model_path)")
    db.execute("DELETE FROM samplers WHERE folder IS NULL AND model_path IS NOT NULL")
    # What is queued is understood when the broker starts: a save before a load may be about to take its name.
    loads = list(db.query("SELECT future, arguments FROM commands WHERE kind = 'load_state' AND state != 'queued'"))
    for load in loads:
        path = decode(load["arguments"], CommandArguments).path
        db.execute(
            "UPDATE commands SET folder = (SELECT folder FROM checkpoints WHERE path = ?) WHERE future = ?",
            [path, load["future"]],
        )
    for table, column in (("checkpoints", "folder"), ("runs", "restore_folder"), ("samplers", "folder")):
        db.table(table).create_index([column])
    db.execute("CREATE INDEX commands_folders ON commands (folder) WHERE folder IS NOT NULL")
    db.execute("CREATE INDEX commands_failed ON commands (finished_at) WHERE state IN ('failed', 'discarded')")


@migrations()
def m006_snapshots(db: Database) -> None:
    db.table("runs").add_column("former_folder", str)
    db.table("runs").add_column("former_seq", int, not_null_default=-1)
    db.table("runs").add_column("snapshot_folder", str)
    db.table("runs").add_column("replay_s", float, not_null_default=0.0)
    # What came before a restore point was dropped when it was set: there is none before it to fall back to.
    db.execute("UPDATE runs SET former_folder = restore_folder, former_seq = restore_seq")
    db.table("runs").create_index(["former_folder"])
    db.table("runs").create_index(["snapshot_folder"])


@migrations()
def m007_blobs(db: Database) -> None:
    # A file below blobs/ that holds what is too large for the row.
    db.table("commands").add_column("payload_file", str)
    db.table("results").add_column("payload_file", str)
    db.table("results").add_column("payload_bytes", int)
    # When somebody was sent the result for the last time.
    db.table("results").add_column("told_at", float)
    for table in ("commands", "results"):
        db.execute(f"CREATE INDEX {table}_files ON {table} (payload_file) WHERE payload_file IS NOT NULL")
    db.execute("CREATE INDEX results_told ON results (told_at) WHERE told_at IS NOT NULL")
    # Of weights without a name, that newer ones of their run have taken the place of.
    db.table("samplers").add_column("outlived", int, not_null_default=0)
    db.execute("CREATE INDEX checkpoints_without_name ON checkpoints (run, seq) WHERE ephemeral")
    db.table("runs").create_index(["session"])


@migrations()
def m008_root_of_folders(db: Database) -> None:
    # One row: below what all folders lie that rows name. A start need not read them to see that nothing has moved.
    db.table("folders_root").create({"root": str}, pk="root")


@migrations()
def m009_expert_lora(db: Database) -> None:
    # Before, nobody trained routed experts.
    db.table("runs").add_column("expert_lora", str, not_null_default="shared")


@migrations()
def m010_imported_adapters(db: Database) -> None:
    # JSON, NULL for all layers of the groups that are trained.
    db.table("runs").add_column("target_modules", str)
    db.table("runs").add_column("alpha", float, not_null_default=32.0)


@migrations()
def m011_named_keys(db: Database) -> None:
    for column in ("id", "name", "scopes"):
        db.table("api_keys").add_column(column, str)
    for column in ("expires_at", "revoked_at", "used_at"):
        db.table("api_keys").add_column(column, float)
    # Until now a key could do whatever its tenant could.
    db.execute("UPDATE api_keys SET id = 'key-' || lower(hex(randomblob(6))), name = '', scopes = 'train,sample,read'")
    db.table("api_keys").create_index(["id"], unique=True)
    db.table("tenants").add_column("weight", float, not_null_default=1.0)
    db.table("tenants").add_column("removed_at", float)
    # Which key a request came with; NULL where an older release accepted it.
    db.table("commands").add_column("key", str)
    db.table("usage").add_column("key", str)
    db.table("usage").create_index(["at"])


@migrations()
def m012_limits(db: Database) -> None:
    # Who may have how much: JSON.
    db.table("limits").create({"holder": str, "limits": str}, pk="holder")
    db.table("runs").add_column("key", str)


@migrations()
def m013_audit(db: Database) -> None:
    db.table("audit").create(
        {"id": int, "at": float, "tenant": str, "by": str, "event": str, "subject": str, "detail": str}, pk="id"
    )
    db.table("audit").create_index(["tenant", "at"])
    for change in ("UPDATE", "DELETE"):
        db.execute(
            f"CREATE TRIGGER audit_no_{change.lower()} BEFORE {change} ON audit"
            " BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END"
        )


@migrations()
def m014_projects(db: Database) -> None:
    db.table("projects").create({"tenant": str, "name": str, "created_at": float}, pk=("tenant", "name"))
    for table in ("client_sessions", "runs", "samplers", "commands", "usage"):
        db.table(table).add_column("project", str, not_null_default="default")


@migrations()
def m015_priorities_and_deadlines(db: Database) -> None:
    for table in ("runs", "samplers"):
        db.table(table).add_column("priority", int, not_null_default=0)
    for column in ("deadline", "timeout_s"):
        db.table("commands").add_column(column, float)


@migrations()
def m016_storage_is_billed(db: Database) -> None:
    # Micro-dollars for a GB and a month: one row.
    db.table("storage_price").create({"price": int})
    # What is kept under a name, until when, and at which price; NULL while it is.
    columns = {"id": int, "path": str, "run": str, "tenant": str, "project": str, "key": str, "base_model": str}
    db.table("stored").create(
        columns | {"bytes": int, "price": int, "since": float, "until": float, "expires_at": float}, pk="id"
    )
    db.table("stored").create_index(["path"])
    db.table("stored").create_index(["tenant", "since"])
    db.execute(
        "INSERT INTO stored (path, run, tenant, project, key, base_model, bytes, price, since, expires_at)"
        " SELECT path, run, checkpoints.tenant, project, key, base_model, size_bytes, 0, checkpoints.created_at,"
        " expires_at"
        " FROM checkpoints JOIN runs ON runs.id = run WHERE NOT ephemeral"
    )


@migrations()
def m017_execution_times(db: Database) -> None:
    # When it was handed out for the first time, how often it was, and its share of the device's time; NULL, 0 and NULL
    # where no actor was given it, or an older release finished it.
    db.table("commands").add_column("started_at", float)
    db.table("commands").add_column("attempts", int, not_null_default=0)
    db.table("commands").add_column("device_s", float)


@migrations()
def m018_samplers_in_flight(db: Database) -> None:
    db.table("samplers").add_column("in_flight", int, not_null_default=0)


@migrations()
def m019_metrics(db: Database) -> None:
    # A step's numbers: MessagePack. `source` is 0 for the user's loop, 1 for training, over so many `data`. It stands
    # before the step, so that the first and the last of a source are found without a walk over the other's.
    db.execute(
        "CREATE TABLE run_metrics (run TEXT NOT NULL, step INTEGER NOT NULL, source INTEGER NOT NULL,"
        " at REAL NOT NULL, data INTEGER NOT NULL, vals BLOB NOT NULL, PRIMARY KEY (run, source, step)) WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE run_metric_names (run TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY (run, name)) WITHOUT ROWID"
    )
    # How many optimizer steps of it are done.
    db.table("runs").add_column("steps", int, not_null_default=0)
    db.execute(
        "UPDATE runs SET steps = (SELECT count(*) FROM commands"
        " WHERE lane = runs.id AND kind = 'optim_step' AND state = 'done')"
    )
    db.execute("CREATE INDEX commands_loads ON commands (lane) WHERE kind = 'load_state'")
    db.execute("CREATE INDEX commands_failed_of_lane ON commands (lane, seq) WHERE state IN ('failed', 'discarded')")
