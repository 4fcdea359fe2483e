"""A disk that takes nothing delays what is to be written; it loses nothing, and does nothing twice."""

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from anyio import from_thread

from lorry.storage.blobs import FOLDER
from lorry.storage.connection import may_pass, unusable
from lorry.storage.store import Store
from lorry.storage.writer import Writer
from lorry.wire.errors import JournalDamagedError, StorageUnavailableError
from lorry.wire.tasks import background_tasks

from .test_blobs import PAYLOAD
from .test_store import command
from .test_store import store as store  # a fixture

LARGE = 100 << 20
"""More bytes than may wait to be written."""


def fill(store: Store, *, full: bool) -> None:
    """SQLite says that the disk is full where the file would grow beyond so many pages."""
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()  # pyright: ignore[reportPrivateUsage]
    store._db.execute(f"PRAGMA max_page_count = {pages if full else 1_000_000}")  # pyright: ignore[reportPrivateUsage]


@contextmanager
def refusing_commits(store: Store) -> Iterator[None]:
    """The system lets no file grow beyond half a megabyte meanwhile: large payloads fit, and the journal is beyond."""
    with store.transaction():
        store.record_event("filler", "", "x" * (1 << 20), 1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder: Path) -> set[str]:
    return {file.name for file in (folder / FOLDER).iterdir()}


def refused(store: Store, *payloads: bytes) -> None:
    with pytest.raises(sqlite3.OperationalError), store.transaction():
        accept(store, *payloads)


def accept(store: Store, *payloads: bytes) -> None:
    for seq, payload in enumerate(payloads):
        store.command_accepted(command(seq), payload, b"", 1.0)


async def test_a_commit_that_is_refused_again_and_again_writes_its_files_once(store: Store, tmp_path: Path) -> None:
    writer = Writer(store)
    tries, enough = 0, anyio.Event()

    def accepted(store: Store) -> None:
        nonlocal tries
        tries += 1
        accept(store, PAYLOAD, PAYLOAD, PAYLOAD[::-1])
        if tries == 3:
            from_thread.run_sync(enough.set)

    async with background_tasks() as tasks:
        with refusing_commits(store):
            tasks.start_soon(writer.run)
            writer.write(accepted)
            await enough.wait()
            written = files(tmp_path)
        await writer.write_and_wait(lambda _: None)
    assert len(written) == 3, "two rows never share a file"
    assert files(tmp_path) == written
    again = Store(tmp_path)
    assert [again.payload(command(seq).future) for seq in range(3)] == [PAYLOAD, PAYLOAD, PAYLOAD[::-1]]


def test_the_files_of_a_refused_commit_stay_for_it_may_be_there_after_a_restart(store: Store, tmp_path: Path) -> None:
    with refusing_commits(store):
        refused(store, PAYLOAD)
        written = files(tmp_path)
        with pytest.raises(RuntimeError), store.transaction():
            accept(store, PAYLOAD, PAYLOAD[::-1])
            raise RuntimeError
    assert len(written) == 1
    assert files(tmp_path) == written, "what was written by a transaction that came to no commit goes"


def test_a_sweep_that_is_tried_again_takes_nothing_that_its_own_commit_names(store: Store, tmp_path: Path) -> None:
    with refusing_commits(store):
        refused(store, PAYLOAD)
    with store.transaction():
        store.blobs_swept()
        accept(store, PAYLOAD)
    assert store.payload(command(0).future) == PAYLOAD


def test_what_a_refused_commit_left_is_swept_after_the_next_commit(store: Store, tmp_path: Path) -> None:
    with refusing_commits(store):
        refused(store, PAYLOAD)
    with store.transaction():
        store.blobs_swept()
    assert len(files(tmp_path)) == 1
    with store.transaction():
        store.blobs_swept()
    assert files(tmp_path) == set()


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
