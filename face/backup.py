"""A copy of a deployment's data as it was at one moment, taken while the service runs; and the way back."""

import os
import shutil
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

from lorry.actors.adapters.folders import written_aside
from lorry.doctor import Finding, examine
from lorry.storage.blobs import FOLDER
from lorry.storage.checkpoints import place_of
from lorry.storage.connection import FILE
from lorry.storage.holding import held
from lorry.storage.store import Store
from lorry.wire.errors import InvalidRequestError, NotFoundError


def back_up(data: Path, destination: Path) -> list[Finding]:
    """Copy the database, the files and folders that it names, and the deployment's keys. Returns what is wrong with the
    copy, which is what is wrong with the original.

    Raises InvalidRequestError for a destination that exists, NotFoundError where there is no database.
    """
    if not (data / FILE).exists():
        raise NotFoundError(f"data is {str(data)!r}, where no Lorry has served yet", field="data")
    _check_new(destination, "destination")
    with _made_whole(destination) as aside, held(data):
        with closing(Store(data)) as store:
            store.copied_to(aside)  # what it names is there now, and stays while it is held
        with closing(Store(aside)) as copied:
            files = [Path(FOLDER) / name for name in copied.blobs_named()]
            folders = [Path("checkpoints", *place_of(Path(folder))) for folder in copied.folders_in_use()]
        keys = [file.relative_to(data) for file in data.glob("*.key")]
        for path in (*files, *folders, *keys):
            _copy(data / path, aside / path)
    return examine(destination)


def restore(backup: Path, data: Path) -> None:
    """Copy a backup to `data`, where `lorry serve` goes on from it.

    Raises InvalidRequestError where `data` holds something, or the backup is damaged; NotFoundError where `backup` is
    none.
    """
    _check_new(data, "data")
    if findings := examine(backup):
        wrong = "; ".join(f"{finding.where}: {finding.problem}" for finding in findings[:3])
        raise InvalidRequestError(f"backup is {str(backup)!r}, which is damaged: {wrong}", field="backup")
    with _made_whole(data) as aside:
        shutil.copytree(backup, aside, dirs_exist_ok=True)
        aside.chmod(0o700)


def _check_new(folder: Path, field: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidRequestError.of(field, str(folder), "a folder that does not exist, or is empty")


@contextmanager
def _made_whole(folder: Path) -> Generator[Path]:
    """As `written_aside`, for its owner alone, and all that is written is durable first."""
    with written_aside(folder) as aside:
        aside.chmod(0o700)  # it holds what tokens are signed with
        yield aside
        os.sync()


def _copy(source: Path, target: Path) -> None:
    """What is named and not there was not made yet, or is for the examination to find."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copy2(source, target)
