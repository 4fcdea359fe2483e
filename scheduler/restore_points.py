"""Where a run is rebuilt from, should its state be lost: from the newest of its saved states, or the one before. Pure.

Payloads of commands are kept until the older of the two covers them, so either will do.
"""

import secrets
from dataclasses import replace
from pathlib import Path

from ..storage.rows import RunRow
from ..wire.ids import RunId


def snapshot_folder(checkpoints: Path, run: RunId) -> str:
    """For a run's next snapshot: named in the journal before anybody writes it, and never used twice."""
    return str(checkpoints / run / "snapshots" / secrets.token_hex(8))


def moved_on(run: RunRow, folder: str, seq: int, replay_s: float = 0.0) -> RunRow:
    """After its whole state up to `seq` was saved. One that comes too late changes nothing."""
    if seq <= run.restore_seq:
        return run
    former = run.restore_folder, run.restore_seq
    return replace(
        run, restore_folder=folder, restore_seq=seq, former_folder=former[0], former_seq=former[1], replay_s=replay_s
    )


def fallen_back(run: RunRow) -> RunRow | None:
    """After its newest saved state turned out to be unreadable; None where there is no other."""
    if (run.former_folder, run.former_seq) == (run.restore_folder, run.restore_seq):
        return None
    return replace(run, restore_folder=run.former_folder, restore_seq=run.former_seq)
