"""Payloads and results too large for a row: one file each, beside the database. A row names the file, and the name says
what must be in it.

A file is durable before the row that names it is, and never changes. Who dies between the two leaves a file that no row
names; `sweep` takes it away. A commit that the disk refused may yet be there after a restart, so its files stay, and
whoever tries again gets them instead of new ones.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..wire.errors import JournalDamagedError
from .holding import deleting

FOLDER = "blobs"
LARGE = 64 * 1024
"""Bytes; up to here a row holds them, and one commit makes any number of them durable."""


class Blobs:
    """The files in `folder`. `settle` before a commit makes durable what was written since the last one; `committed`
    after it, or `take_back`, says what came of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unsettled: list[str] = []
        self._settled: list[str] = []
        self._doubtful: dict[str, list[str]] = {}
        """By digest, the files of a commit that was refused: each is for one row of the next."""

    def write(self, content: bytes) -> str:
        """The name that a row is to keep. Raises OSError, and leaves nothing then."""
        digest = _digest(content)
        if doubtful := self._doubtful.get(digest):
            self._settled.append(doubtful.pop())
            return self._settled[-1]
        name = f"{digest}.{secrets.token_hex(8)}"
        self._folder.mkdir(exist_ok=True)
        try:
            with open(self._folder / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            (self._folder / name).unlink(missing_ok=True)
            raise
        self._unsettled.append(name)
        return name

    def settle(self) -> None:
        """The names of the files are durable, too. Raises OSError."""
        if self._unsettled:
            _fsync_folder(self._folder)
            _fsync_folder(self._folder.parent)
            self._settled += self._unsettled
            self._unsettled.clear()

    def committed(self) -> None:
        """Nothing is in doubt any more: what the disk may have kept of an earlier try is overwritten by this commit."""
        self._settled.clear()
        self._doubtful.clear()

    def take_back(self) -> None:
        """The transaction failed. What was not settled is named by no row; the rest is in doubt."""
        written, self._unsettled = self._unsettled, []
        self.delete(written)
        for name in self._settled:
            self._doubtful.setdefault(_digest_in(name), []).append(name)
        self._settled.clear()

    def read(self, name: str) -> bytes:
        """Raises JournalDamagedError where it is not what was written."""
        try:
            content = (self._folder / name).read_bytes()
        except OSError as error:
            raise JournalDamagedError(f"{FOLDER}/{name} cannot be read: {error.strerror}") from None
        if _digest(content) != _digest_in(name):
            raise JournalDamagedError(f"{FOLDER}/{name} is damaged: it is not what was written to it")
        return content

    def delete(self, names: Iterable[str]) -> None:
        """A file that cannot be deleted, or not now, stays for the next sweep."""
        if not (gone := list(names)):
            return
        with suppress(OSError), deleting(self._folder.parent) as allowed:
            for name in gone if allowed else ():
                (self._folder / name).unlink(missing_ok=True)

    def names(self) -> set[str]:
        """Of all files, but for those in doubt: the transaction that asks may yet name them again."""
        if not self._folder.exists():
            return set()
        return {entry.name for entry in os.scandir(self._folder)}.difference(*self._doubtful.values())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _digest_in(name: str) -> str:
    return name.partition(".")[0]


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
