"""When the power goes, what was acknowledged is on the disk: its rows, its files, and saved states, whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorry.actors.adapters.folders import verify
from lorry.storage.blobs import FOLDER
from lorry.storage.store import Store
from lorry.wire.errors import CheckpointError, JournalDamagedError
from tests.conftest import ROOT
from tests.storage.test_store import command

from .disk import Disk
from .writer import payload

FAULTS = (
    "the journal is not synced",
    "files are not synced",
    "names of files are not synced",
    "folders are not synced",
)


def cut(disk: Disk, fault: str, *, after: int, folder: Path) -> tuple[Path, int]:
    """What is on the disk, and the last command that was acknowledged."""
    command = [sys.executable, "-m", "tests.power.writer", fault]
    environment = os.environ | disk.environment
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= after:
                break
        process.kill()
        last = max([int(line) for line in process.stdout.read().splitlines()], default=after)
    return disk.after_a_power_cut(folder), last


def lost(root: Path, last: int) -> list[str]:
    """What was acknowledged and is not there."""
    try:
        store = Store(root)
        found: list[str] = []
        for seq in range(last + 1):
            try:
                if store.payload(command(seq).future) != payload(seq):
                    found.append(f"command {seq}")
                if seq % 10 == 0:
                    verify(root / "checkpoints" / "run-1" / "snapshots" / str(seq))
            except (JournalDamagedError, CheckpointError) as error:
                found.append(str(error))
        return found
    except JournalDamagedError as error:
        return [str(error)]


@pytest.mark.parametrize("after", [0, 7, 33])
def test_what_was_acknowledged_survives(tmp_path: Path, after: int) -> None:
    root, last = cut(Disk.made(tmp_path), "none", after=after, folder=tmp_path / "after")
    assert last >= after
    assert lost(root, last) == []
    assert (root / FOLDER).exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_forgets_shows_what_is_not_synced(tmp_path: Path, fault: str) -> None:
    root, last = cut(Disk.made(tmp_path), fault, after=33, folder=tmp_path / "after")
    assert lost(root, last) != []
