"""What is too large for a row lies in a file that is durable before its row, and goes after it."""

import os
from pathlib import Path

import pytest
from sqlite_utils import Database

from lorry.storage.blobs import FOLDER, LARGE, Blobs
from lorry.storage.connection import FILE
from lorry.storage.rows import ResultRow, RunRow
from lorry.storage.schema import migrations
from lorry.storage.store import Store
from lorry.wire.codec import decode
from lorry.wire.errors import ErrorInfo, JournalDamagedError
from lorry.wire.ids import FutureId

from .test_store import ALICE, RUN, command
from .test_store import store as store  # a fixture

PAYLOAD = os.urandom(LARGE + 1)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / FOLDER).glob("*"))


def accept(store: Store, seq: int, payload: bytes = PAYLOAD, now: float = 1.0) -> FutureId:
    with store.transaction():
        store.command_accepted(command(seq), payload, b"digest", now)
    return command(seq).future


def finish(store: Store, seq: int, payload: bytes = PAYLOAD, now: float = 2.0) -> None:
    with store.transaction():
        store.command_finished(ResultRow(command(seq).future, None, payload), "done", None, [], now)


def test_only_what_is_large_has_a_file(store: Store, tmp_path: Path) -> None:
    assert store.payload(accept(store, 0, PAYLOAD[:LARGE])) == PAYLOAD[:LARGE]
    assert files(tmp_path) == []
    assert Store(tmp_path).payload(accept(store, 1)) == PAYLOAD
    finish(store, 1)
    assert Store(tmp_path).result(command(1).future) == ResultRow(command(1).future, None, PAYLOAD)
    assert [file.stat().st_size for file in files(tmp_path)] == [len(PAYLOAD)] * 2


def test_a_file_is_durable_before_its_row(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        happened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).parts[0:1] and "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    store._db.conn.set_trace_callback(lambda sql: happened.append(sql.split()[0]))  # pyright: ignore[reportPrivateUsage]
    accept(store, 0)
    assert happened.index("file") < happened.index("INSERT") < happened.index("COMMIT")
    assert "file" in happened[happened.index("INSERT") : happened.index("COMMIT")]  # its folder


def test_a_file_goes_after_the_commit_that_drops_it(store: Store, tmp_path: Path) -> None:
    for seq in range(3):
        accept(store, seq)
    with pytest.raises(RuntimeError), store.transaction():
        store.payload_dropped(command(0).future)
        raise RuntimeError
    assert [len(store.payload(command(seq).future)) for seq in range(3)] == [len(PAYLOAD)] * 3
    with store.transaction():
        store.payload_dropped(command(0).future)
        store.restore_points_set(restored(1))
        assert len(files(tmp_path)) == 3
    assert [store.payload(command(seq).future) for seq in range(3)] == [b"", b"", PAYLOAD]
    assert len(files(tmp_path)) == 1


def restored(seq: int) -> RunRow:
    return RunRow(RUN.id, ALICE, "nonce", "base", RUN.lora, {}, 1.0, 1.0, "b", seq, former_folder="a", former_seq=seq)


def test_a_transaction_that_fails_leaves_no_file(store: Store, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), store.transaction():
        store.command_accepted(command(0), PAYLOAD, b"digest", 1.0)
        raise RuntimeError
    assert files(tmp_path) == []


def test_what_no_row_names_is_swept_and_nothing_else(store: Store, tmp_path: Path) -> None:
    accept(store, 0)
    finish(store, 0)
    Blobs(tmp_path / FOLDER).write(PAYLOAD)  # who wrote it died before the row
    assert len(files(tmp_path)) == 3
    with store.transaction():
        store.blobs_swept()
    assert len(files(tmp_path)) == 2
    assert store.payload(command(0).future) == PAYLOAD


@pytest.mark.parametrize("harm", ["a byte flips", "it is cut", "it is gone"])
def test_what_is_read_is_what_was_written_or_an_error(store: Store, tmp_path: Path, harm: str) -> None:
    accept(store, 0)
    finish(store, 0)
    for file in files(tmp_path):
        content = bytearray(file.read_bytes())
        content[77] ^= 1
        file.unlink()
        if harm != "it is gone":
            file.write_bytes(content if harm == "a byte flips" else content[:-5])
    with pytest.raises(JournalDamagedError, match="blobs/"):
        store.payload(command(0).future)
    result = store.result(command(0).future)
    assert result is not None and result.error is not None and result.payload is None
    assert decode(result.error, ErrorInfo).code == "JournalDamagedError"


def test_a_result_is_kept_until_it_was_read_and_a_while_or_is_old(store: Store, tmp_path: Path) -> None:
    told, unread, newest = (accept(store, seq) for seq in range(3))
    for seq in range(3):
        finish(store, seq)
    with store.transaction():
        store.results_told([told], 100.0)
    everything = {told, unread, newest}

    def left(before: float, read_before: float) -> set[FutureId]:
        with store.transaction():
            store.results_expired(before, read_before)
        return {future for future in everything if store.result(future)}

    assert left(0.0, 1000.0) == everything  # its client was not seen since: it may have got nothing
    accept(store, 3, b"", now=110.0)
    assert left(0.0, 1000.0) == everything  # and what was under way is asked for again
    accept(store, 4, b"", now=161.0)
    assert left(0.0, 100.0) == everything
    assert left(0.0, 101.0) == {unread, newest}
    assert len(files(tmp_path)) == 5
    assert left(3.0, 0.0) == {newest}
    assert len(files(tmp_path)) == 4


def test_space_that_is_free_is_given_back(store: Store, tmp_path: Path) -> None:
    with store.transaction():
        for seq in range(1000):
            store.command_accepted(command(seq), PAYLOAD[:LARGE], b"digest", 1.0)
    store.checkpoint_wal()
    full = (tmp_path / FILE).stat().st_size
    with store.transaction():
        for seq in range(1000):
            store.payload_dropped(command(seq).future)
    while store.give_back():
        pass
    store.checkpoint_wal()
    assert full > 60_000_000 and (tmp_path / FILE).stat().st_size < 6_000_000


def test_an_older_database_gives_space_back_too(tmp_path: Path) -> None:
    old = Database(tmp_path / FILE)
    migrations.apply(old, stop_before="m007_blobs")
    assert old.execute("PRAGMA auto_vacuum").fetchone() == (0,)
    old.close()
    store = Store(tmp_path)
    assert store.rows("PRAGMA auto_vacuum") == [{"auto_vacuum": 2}]
    store.create_key(ALICE, 1.0)
    store.run_created(RUN)
    assert store.payload(accept(store, 0)) == PAYLOAD
