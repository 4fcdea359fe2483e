"""Rows name folders by their whole path: after a move they are rewritten, once, and a start without one reads none."""

from pathlib import Path

import pytest
from sqlite_utils import Database

from lorry.scheduler.restore_points import moved_on
from lorry.storage.connection import FILE
from lorry.storage.rows import CheckpointRow
from lorry.storage.schema import migrations
from lorry.storage.store import Store

from .test_store import ALICE, RUN
from .test_store import store as store  # a fixture


def moved(store: Store, root: Path) -> list[str]:
    """What the database was asked while it learned that folders lie below `root`."""
    asked: list[str] = []
    store._db.conn.set_trace_callback(asked.append)  # pyright: ignore[reportPrivateUsage]
    with store.transaction():
        store.moved_to(root)
    store._db.conn.set_trace_callback(None)  # pyright: ignore[reportPrivateUsage]
    return [sql for sql in asked if "checkpoints" in sql]


def test_folders_are_looked_through_only_where_the_data_has_moved(store: Store, tmp_path: Path) -> None:
    place = "run-1/weights/x.0"
    saved = CheckpointRow(
        "p", RUN.id, ALICE, "training", "x", f"/old/{place}", 0, 1, "", created_at=1.0, expires_at=None
    )
    store.checkpoint_saved(saved)
    store.restore_points_set(moved_on(RUN, f"/old/{place}", 0))
    for root in (Path("/here"), Path("/there"), Path("/here")):
        assert moved(store, root) != []
        assert store.folders_in_use() == {f"{root}/{place}"}
        assert moved(store, root) == []
        again = Store(tmp_path)
        assert moved(again, root) == [] and again.folders_in_use() == {f"{root}/{place}"}
        again.close()


def test_a_move_that_is_not_committed_is_made_again(store: Store) -> None:
    store.restore_points_set(moved_on(RUN, "/old/run-1/weights/x.0", 0))
    with pytest.raises(RuntimeError), store.transaction():
        store.moved_to(Path("/here"))
        raise RuntimeError
    with store.transaction():
        store.moved_to(Path("/here"))
    assert store.folders_in_use() == {"/here/run-1/weights/x.0"}


def test_an_older_database_learns_where_its_folders_lie(tmp_path: Path) -> None:
    old = Database(tmp_path / FILE)
    migrations.apply(old, stop_before="m008_root_of_folders")
    old.table("tenants").insert({"id": ALICE, "created_at": 1.0})
    old.table("runs").insert({"id": RUN.id, "tenant": ALICE, "nonce": "n", "restore_folder": "/old/run-1/weights/x.0"})
    old.close()
    store = Store(tmp_path)
    assert moved(store, Path("/here")) != []
    assert store.folders_in_use() == {"/here/run-1/weights/x.0"}
