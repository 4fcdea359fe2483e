"""One connection to the database: what a transaction is, and how the file gives back what is free."""

import sqlite3
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from ..wire.errors import (
    JournalDamagedError,
    NewerReleaseError,
    OlderReleaseError,
    StorageError,
    StorageUnavailableError,
)
from . import holding, opening
from .blobs import FOLDER, Blobs
from .data_folder import make_private, make_private_file
from .schema import migrations, missing, unknown

FILE = "lorry.db"
_SPARE_PAGES = 1024
"""Free pages that stay in the file for what comes next: 4 MiB."""
_PAGES_AT_ONCE = 4096
"""What one commit gives back: 16 MiB, which does not delay the next for long."""


_PASSES = frozenset(
    (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN)
)


def may_pass(error: BaseException) -> bool:
    """Whether it is the disk that refuses, not what was to be written."""
    if isinstance(error, sqlite3.Error):
        # The low byte is the kind of error, the rest its details; what Python itself raises has none.
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSES
    return isinstance(error, OSError)


def unusable(folder: Path, error: sqlite3.DatabaseError) -> StorageError:
    """What to tell of a database that cannot be opened or read."""
    if may_pass(error):
        return StorageUnavailableError(f"{folder / FILE} cannot be used at the moment: {error}")
    return JournalDamagedError(f"{folder / FILE} cannot be used: {error}")


class Connection:
    """A connection to the database in `folder`, which is made, and migrated, where it does not exist; one that is
    `read_only` changes nothing there.

    Raises JournalDamagedError for a file that is no database (any more), StorageUnavailableError where the disk refuses
    it; where it is only read, OlderReleaseError or NewerReleaseError for another release's.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        if not read_only:
            make_private(folder)
            make_private_file(folder / FILE)
            make_private_file(folder / holding.FILE)  # who only looks takes the lock, and makes no file
        open_ = opening.to_read if read_only else opening.to_write
        with ExitStack() as stack:
            try:
                self._db = Database(stack.enter_context(closing(open_(folder / FILE))))
                if read_only:
                    _check_release(self._db, folder / FILE)
                elif migrations.pending(self._db):
                    migrations.apply(self._db)
            except sqlite3.DatabaseError as error:
                raise unusable(folder, error) from error
            stack.pop_all()
        self._blobs = Blobs(folder / FOLDER)
        self._unnamed: list[str] = []

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Generator[None]:
        """All or nothing, and durable when the block has ended. Files that its rows name are durable before it is;
        those that they name no more go after it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._blobs.settle()
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.conn.in_transaction:  # SQLite itself ends one that finds the disk full
                self._db.execute("ROLLBACK")
            self._unnamed.clear()
            if isinstance(error, Exception):
                self._blobs.take_back()
            raise
        self._blobs.committed()
        unnamed, self._unnamed = self._unnamed, []
        self._blobs.delete(unnamed)

    @contextmanager
    def snapshot(self) -> Generator[None]:
        """What is read in the block is of one moment, whatever is written meanwhile. So it is in a transaction."""
        if self._db.conn.in_transaction:
            yield
            return
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def rows(self, sql: str, *values: object, **named: object) -> list[dict[str, Any]]:
        """For this package's own questions."""
        return list(self._db.query(sql, named or values))

    def checkpoint_wal(self) -> None:
        """What was committed moves into the database's own file. Not inside a transaction."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def copied_to(self, folder: Path) -> None:
        """A copy of the database as it is now, whole, while others write."""
        make_private_file(folder / FILE)
        with closing(sqlite3.connect(folder / FILE)) as copy:
            self._db.conn.backup(copy)

    def give_back(self) -> bool:
        """Some pages of the file that are free, unless they are few, go back to the file system. Whether there are
        more."""
        (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        for _ in range(min(free - _SPARE_PAGES, _PAGES_AT_ONCE)):
            self._db.execute(
                "PRAGMA incremental_vacuum(1)"
            )  # of more, sqlite3 would still execute the first step alone
        return free - _PAGES_AT_ONCE > _SPARE_PAGES


def values_of(row: Any) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row)}


def _check_release(db: Database, file: Path) -> None:
    if names := unknown(db):
        raise NewerReleaseError(f"{file} was written by a newer release of Lorry: it has {', '.join(names)}")
    if names := missing(db):
        raise OlderReleaseError(f"{file} was written by an older release of Lorry: it has no {', '.join(names)}")
