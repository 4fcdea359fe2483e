"""How the database's file is opened: to serve from it, or to look at it so that nothing in its folder changes."""

import sqlite3
from pathlib import Path

_WAL_BYTES = 64 << 20


def to_write(file: Path) -> sqlite3.Connection:
    connection = _connect(str(file))
    try:
        _configure(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def to_read(file: Path) -> sqlite3.Connection:
    """Whether somebody writes meanwhile or not, and on a medium that takes no writes, too.

    SQLite itself would make the files beside a database that it only reads, and leave them to whoever comes next.
    """
    if is_at_rest(file):
        # No file beside it holds anything, so this one is all, and is read without any.
        return _connect(f"{file.absolute().as_uri()}?immutable=1", uri=True)
    if _index(file).exists():
        return _connect(f"{file.absolute().as_uri()}?mode=ro&readonly_shm=1", uri=True)
    # The machine went down before the index was on the disk. Who has the file alone keeps one in memory.
    connection = _connect(f"{file.absolute().as_uri()}?mode=ro&vfs=unix-none", uri=True)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    return connection


def is_at_rest(file: Path) -> bool:
    """Whether nobody has it open, nor died while they had."""
    log = file.with_name(f"{file.name}-wal")
    return not log.exists() or (log.stat().st_size == 0 and not _index(file).exists())


def _index(file: Path) -> Path:
    return file.with_name(f"{file.name}-shm")


def _connect(place: str, *, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(place, isolation_level=None, check_same_thread=False, timeout=30, uri=uri)


def _configure(connection: sqlite3.Connection) -> None:
    (reclaims,) = connection.execute("PRAGMA auto_vacuum").fetchone()
    if not reclaims:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        if connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            connection.execute("VACUUM")  # written by an older release
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
