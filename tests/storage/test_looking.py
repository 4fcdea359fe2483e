"""Who only looks changes nothing: no byte, no file, no schema; whether somebody serves from the folder or not."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlite_utils import Database

from lorry.backup import back_up, restore
from lorry.billing import Asked, print_usage
from lorry.doctor import examine
from lorry.printing import plain_console
from lorry.reports import print_status
from lorry.storage import holding
from lorry.storage.connection import FILE
from lorry.storage.looking import looking
from lorry.storage.schema import migrations
from lorry.storage.store import Store
from lorry.wire.errors import InvalidRequestError, LorryError, NewerReleaseError, NotFoundError, OlderReleaseError

from .test_blobs import PAYLOAD, accept
from .test_store import ALICE, RUN
from .test_store import store as store  # a fixture

LAST = "m019_metrics"
BESIDE = (f"{FILE}-wal", f"{FILE}-shm")


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Names, modes, times and contents: permissions would not keep root from changing them."""
    found: dict[str, tuple[int, int, bytes]] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (path.stat().st_mode, path.stat().st_mtime_ns, content)
    return found


def make_read_only(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def at_rest(folder: Path, store: Store) -> None:
    store.close()
    shutil.copytree(folder, folder.with_name("found"))


def killed(folder: Path, store: Store) -> None:
    shutil.copytree(folder, folder.with_name("found"))
    store.close()


def killed_with_its_machine(folder: Path, store: Store) -> None:
    killed(folder, store)
    (folder.with_name("found") / BESIDE[1]).unlink()


@pytest.fixture(params=[at_rest, killed, killed_with_its_machine])
def found(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The data of a service that ended in one of three ways, on a medium that takes no writes."""
    folder = tmp_path / "data"
    store = Store(folder)
    store.create_key(ALICE, 1.0)
    store.run_created(RUN)
    accept(store, 0)
    request.param(folder, store)
    make_read_only(tmp_path / "found")
    return tmp_path / "found"


def older(folder: Path) -> None:
    database = Database(folder / FILE)
    migrations.apply(database, stop_before=LAST)
    database.close()


def newer(folder: Path) -> None:
    Store(folder).close()
    database = Database(folder / FILE)
    database.table("_sqlite_migrations").insert({"migration_set": "lorry", "name": "m999_later", "applied_at": "now"})
    database.close()


LOOKS: dict[str, Callable[[Path], object]] = {
    "doctor": examine,
    "backup": lambda data: back_up(data, data.with_name("copy")),
    "usage": lambda data: print_usage(plain_console(), data, Asked()),
    "status": lambda data: print_status(plain_console(), data),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_changes_nothing(found: Path, look: str) -> None:
    before = everything(found)
    assert not LOOKS[look](found)
    assert everything(found) == before


def test_a_look_sees_all_that_was_committed_and_can_write_nothing(found: Path) -> None:
    with looking(found) as store:
        assert [run.id for run in store.runs()] == [RUN.id]
        assert [row.seq for row in store.queued_commands()] == [0]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            store.run_created(RUN)


def test_a_look_at_what_is_written_meanwhile_sees_it(store: Store, tmp_path: Path) -> None:
    with looking(tmp_path) as looked:
        for seq in range(3):
            accept(store, seq)
            assert [row.seq for row in looked.queued_commands()] == list(range(seq + 1))
        store.checkpoint_wal()
        accept(store, 3)
        assert len(looked.queued_commands()) == 4
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            looked.run_created(RUN)


def test_what_a_service_changes_that_starts_meanwhile_is_not_taken_for_damage(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with pytest.raises(InvalidRequestError, match="no service starts or stops meanwhile"), looking(tmp_path):
        service = Store(tmp_path)
        service.create_key(ALICE, 1.0)
        service.close()
        raise sqlite3.DatabaseError("database disk image is malformed")


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    ("make", "refusal", "says"),
    [(older, OlderReleaseError, f"no {LAST}.*`lorry serve`"), (newer, NewerReleaseError, "has m999_later")],
)
def test_another_releases_schema_is_refused_and_stays(
    tmp_path: Path, look: str, make: Callable[[Path], None], refusal: type[LorryError], says: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    make(data)
    make_read_only(data)
    before = everything(data)
    with pytest.raises(refusal, match=says):
        LOOKS[look](data)
    assert everything(data) == before
    assert os.listdir(tmp_path) == ["data"]


def test_where_nobody_has_served_nothing_is_made(tmp_path: Path) -> None:
    for look in LOOKS.values():
        with pytest.raises(NotFoundError, match="where no Lorry has served yet"):
            look(tmp_path / "data")
    assert os.listdir(tmp_path) == []


def test_a_backup_on_a_medium_that_takes_no_writes_is_restored_to_one_that_does(store: Store, tmp_path: Path) -> None:
    accept(store, 0)
    (tmp_path / "operator.key").write_text("secret")
    backup, data = tmp_path / "backup", tmp_path / "restored"
    assert back_up(tmp_path, backup) == []
    make_read_only(backup)
    before = everything(backup)
    assert examine(backup) == []
    restore(backup, data)
    assert everything(backup) == before
    modes = {path.stat().st_mode & 0o777 for path in (data, *data.rglob("*"))}
    assert modes == {0o700, 0o600}
    restored = Store(data)
    assert restored.payload(restored.queued_commands()[0].future) == PAYLOAD
    restored.close()


def test_what_an_older_release_backed_up_is_brought_up_to_date_in_the_copy(tmp_path: Path) -> None:
    backup, data = tmp_path / "backup", tmp_path / "restored"
    backup.mkdir()
    older(backup)
    make_read_only(backup)
    before = everything(backup)
    restore(backup, data)
    assert everything(backup) == before
    assert examine(data) == []


def test_a_service_makes_the_lock_that_a_look_takes(tmp_path: Path) -> None:
    Store(tmp_path).close()
    before = everything(tmp_path)
    with holding.held(tmp_path), holding.deleting(tmp_path) as allowed:
        assert not allowed
    assert everything(tmp_path) == before
