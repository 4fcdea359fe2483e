"""A copy of a deployment's data as it was at one moment, taken while the service runs; and the way back."""

import os
import shutil
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from lorry.actors.adapters.folders import written_aside
from lorry.doctor import Finding, examine
from lorry.storage.blobs import FOLDER
from lorry.storage.checkpoints import place_of
from lorry.storage.data_folder import make_private_file
from lorry.storage.holding import held
from lorry.storage.looking import looking
from lorry.storage.store import Store
from lorry.wire.errors import InvalidRequestError, JournalDamagedError, OlderReleaseError


def back_up(data: Path, destination: Path) -> list[Finding]:
    """Copy the database, the files and folders that it names, and the deployment's keys. Returns what is wrong with the
    copy, which is what is wrong with the original.

    Raises InvalidRequestError for a destination that exists, and what `looking` raises.
    """
    check_new(destination, "destination")
    with looking(data):
        pass  # what cannot be copied is said before anything is made
    with held(data), _made_whole(destination) as aside:
        with looking(data) as store:
            store.copied_to(aside)  # what it names is there now, and stays while it is held
        with looking(aside) as copied:
            files = [Path(FOLDER) / name for name in copied.blobs_named()]
            folders = [Path("checkpoints", *place_of(Path(folder))) for folder in copied.folders_in_use()]
        keys = [file.relative_to(data) for file in data.glob("*.key")]
        for path in (*files, *folders, *keys):
            _copy(data / path, aside / path)
    return examine(destination)


def restore(backup: Path, data: Path) -> None:
    """Copy a backup to `data`, where `lorry serve` goes on from it. The backup stays as it is, and may lie on a medium
    that takes no writes; the copy of one that an older release made is brought up to date.

    Raises InvalidRequestError where `data` holds something, or the backup is damaged; NotFoundError where `backup` is
    none, NewerReleaseError where a newer release made it.
    """
    check_new(data, "data")
    is_older = False
    try:
        _check_whole(backup, backup)
    except OlderReleaseError:
        is_older = True
    with _made_whole(data) as aside:
        _copy(backup, aside)
        if is_older:
            with suppress(JournalDamagedError), closing(Store(aside)):
                pass
            _check_whole(aside, backup)


def check_new(folder: Path, field: str) -> None:
    """Raises InvalidRequestError where something is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidRequestError.of(field, str(folder), "a folder that does not exist, or is empty")


@contextmanager
def _made_whole(folder: Path) -> Generator[Path]:
    """As `written_aside`, for its owner alone, and all that is written is durable first."""
    with written_aside(folder) as aside:
        aside.chmod(0o700)  # it holds what tokens are signed with
        yield aside
        os.sync()


def _check_whole(folder: Path, backup: Path) -> None:
    if findings := examine(folder):
        wrong = "; ".join(f"{finding.where}: {finding.problem}" for finding in findings[:3])
        raise InvalidRequestError(f"backup is {str(backup)!r}, which is damaged: {wrong}", field="backup")


def _copy(source: Path, target: Path) -> None:
    """What is named and not there was not made yet, or is for the examination to find. The copy can be written,
    whatever the original's medium says."""
    if source.is_dir():
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        for inner in source.iterdir():
            _copy(inner, target / inner.name)
    elif source.exists():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_private_file(target)
        shutil.copyfile(source, target)
