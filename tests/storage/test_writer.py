"""A disk that takes nothing delays what is to be written; it loses nothing, and does nothing twice."""

import sqlite3
from pathlib import Path

import anyio
import pytest

from lorry.storage.connection import may_pass, unusable
from lorry.storage.store import Store
from lorry.storage.writer import Writer
from lorry.wire.errors import JournalDamagedError, StorageUnavailableError
from lorry.wire.tasks import background_tasks

from .test_store import command
from .test_store import store as store  # a fixture

LARGE = 100 << 20
"""More bytes than may wait to be written."""


def fill(store: Store, *, full: bool) -> None:
    """SQLite says that the disk is full where the file would grow beyond so many pages."""
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()  # pyright: ignore[reportPrivateUsage]
    store._db.execute(f"PRAGMA max_page_count = {pages if full else 1_000_000}")  # pyright: ignore[reportPrivateUsage]


async def test_what_a_full_disk_refuses_is_written_once_there_is_room(store: Store, tmp_path: Path) -> None:
    writer = Writer(store)
    order: list[int] = []
    runs = 0

    def first(store: Store) -> int:
        nonlocal runs
        runs += 1
        store.command_accepted(command(0), b"x" * 60_000, b"", 1.0)
        return runs

    async with background_tasks() as tasks:
        fill(store, full=True)
        writer.write(first, order.append, size=LARGE)
        writer.write(lambda store: store.command_accepted(command(1), b"", b"", 1.0), lambda _: order.append(0))
        tasks.start_soon(writer.run)
        await writer.room_for_requests()  # who asks is to be told why not
        assert writer.trouble is not None and "full" in writer.trouble
        assert order == [] and Store(tmp_path).queued_commands() == []
        fill(store, full=False)
        await writer.write_and_wait(lambda _: None)
        assert order == [runs, 0] and runs > 1
        assert writer.trouble is None
    assert [row.seq for row in Store(tmp_path).queued_commands()] == [0, 1]


async def test_a_file_that_cannot_be_written_delays_its_row(store: Store, tmp_path: Path) -> None:
    writer = Writer(store)
    (tmp_path / "blobs").write_text("where a folder should be")
    async with background_tasks() as tasks:
        tasks.start_soon(writer.run)
        writer.write(lambda store: store.command_accepted(command(0), b"x" * 100_000, b"", 1.0), size=LARGE)
        await writer.room_for_requests()
        assert Store(tmp_path).queued_commands() == []
        (tmp_path / "blobs").unlink()
        await writer.write_and_wait(lambda _: None)
    assert Store(tmp_path).payload(command(0).future) == b"x" * 100_000


async def test_who_hands_in_faster_than_the_disk_writes_is_to_wait(store: Store) -> None:
    writer = Writer(store)
    writer.write(lambda _: None, size=LARGE)
    with pytest.raises(TimeoutError), anyio.fail_after(0.05):
        await writer.room()
    with pytest.raises(TimeoutError), anyio.fail_after(0.05):
        await writer.room_for_requests()
    async with background_tasks() as tasks:
        tasks.start_soon(writer.run)
        await writer.room()
        await writer.room_for_requests()


@pytest.mark.parametrize(("code", "passes"), [(13, True), (10 | (4 << 8), True), (8, True), (11, False), (0, False)])
def test_what_the_disk_refuses_is_no_damage(tmp_path: Path, code: int, passes: bool) -> None:
    error = sqlite3.OperationalError("refused")
    error.sqlite_errorcode = code
    assert may_pass(error) is passes
    assert type(unusable(tmp_path, error)) is (StorageUnavailableError if passes else JournalDamagedError)
