"""A database in memory that outlives its broker, and dies with a statement when it is told to."""

import random
import sqlite3
from pathlib import Path
from typing import Any


class CrashedError(BaseException):
    """The broker's process ends here: no handler of its own may see it as an error."""


class Memory(sqlite3.Connection):
    """Both of a broker's stores use the one connection: what runs in a thread runs alone here."""

    countdown: int | None = None
    is_in_thread = has_crashed = False
    chance: random.Random

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:  # type: ignore[override]
        if self.has_crashed and sql != "ROLLBACK":
            raise CrashedError  # whatever cleans up finds no process, either
        if self.countdown is not None and self.is_in_thread and sql != "ROLLBACK":
            self.countdown -= 1
            if self.countdown < 0:
                self.countdown, self.has_crashed = None, True
                if sql == "COMMIT" and self.chance.random() < 0.5:
                    super().execute(sql)
                raise CrashedError
        return super().execute(sql, *values)

    def close(self) -> None:
        """A broker that ends leaves nothing half done."""
        self.has_crashed = False
        if self.in_transaction:
            super().execute("ROLLBACK")

    def restore_points(self) -> list[tuple[str, str | None, str | None]]:
        """Of each run: the folders of its newest saved state, and of the one before."""
        return super().execute("SELECT id, restore_folder, former_folder FROM runs ORDER BY rowid").fetchall()

    def gone(self) -> None:
        super().close()


def fresh(template: bytes) -> Memory:
    memory = Memory(":memory:", isolation_level=None, check_same_thread=False)
    memory.deserialize(template)
    return memory


def template_of(file: Path) -> bytes:
    """A database as the store makes it, to be copied into memory."""
    source = sqlite3.connect(file)
    source.execute("PRAGMA journal_mode = DELETE")  # a database in memory knows no other
    copy = sqlite3.connect(":memory:")
    source.backup(copy)
    source.close()
    content = copy.serialize()
    copy.close()
    return content
