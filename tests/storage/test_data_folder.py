"""What lies in the data folder is its owner's alone, whoever made the folder and whatever the umask says."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorry.keys import operator_key
from lorry.storage.connection import FILE
from lorry.storage.data_folder import make_private
from lorry.storage.lock import sole_writer
from lorry.storage.store import Store
from lorry.wire.errors import InvalidRequestError
from tests.conftest import LORRY


@pytest.fixture(autouse=True)
def open_handed() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def enter(folder: Path) -> None:
    with sole_writer(folder):
        pass


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("use", [lambda folder: Store(folder).close(), enter, operator_key])
def test_a_data_folder_is_made_its_owners_alone(tmp_path: Path, use: Callable[[Path], object], is_new: bool) -> None:
    folder = tmp_path / "data"
    if not is_new:
        folder.mkdir(mode=0o755)
    use(folder)
    assert mode(folder) == 0o700
    assert {file.name for file in folder.iterdir() if file.suffix in (".db", ".key") and mode(file) & 0o077} == set()


def test_a_key_that_is_made_first_leaves_nothing_open(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    subprocess.run([*LORRY, "keys", "create", "--tenant", "alice", "--data", str(folder)], check=True, umask=0o022)
    assert (mode(folder), mode(folder / FILE)) == (0o700, 0o600)


def test_the_files_beside_an_open_database_are_as_private_as_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert {file.name for file in tmp_path.iterdir() if mode(file) & 0o077} == set()
    assert len(list(tmp_path.glob(f"{FILE}*"))) == 3
    store.close()


def test_a_folder_that_others_share_stays_theirs(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    make_private(tmp_path)
    assert mode(tmp_path) == 0o1777


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    os.chown(tmp_path / "data", 12345, -1)
    make_private(tmp_path / "data")
    assert mode(tmp_path / "data") == 0o755


def test_a_file_where_the_folder_should_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(InvalidRequestError, match="expected a folder"):
            make_private(place)
