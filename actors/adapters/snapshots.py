"""Snapshots: the service's own copies of a run's whole training state, flat as it lies in memory; no user names them.

A run is rebuilt from its newest one, or from a checkpoint of the user's, whichever is newer.
"""

from dataclasses import dataclass
from pathlib import Path

from ...wire.actor_messages import SnapshotFailed, SnapshotTaken
from ..model.adapter import Adapter, TrainingState
from .checkpoints import read_state, read_vectors, write_state
from .folders import seal, verify, written_aside

_VECTORS = "snapshot.safetensors"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is to be written of a run, whose commands it covers up to `seq`."""

    run: str
    folder: str
    seq: int
    state: TrainingState


def write_snapshot(snapshot: Snapshot) -> SnapshotTaken | SnapshotFailed:
    """From any thread. What the disk refuses costs nothing but the snapshot."""
    try:
        with written_aside(Path(snapshot.folder)) as aside:
            write_state(aside, _VECTORS, snapshot.state, weights=True)
            seal(aside)
    except OSError as error:
        return SnapshotFailed(snapshot.run, snapshot.folder, str(error))
    return SnapshotTaken(snapshot.run, snapshot.folder, snapshot.seq, 0.0)


def restore_state(adapter: Adapter, folder: Path) -> None:
    """Makes `adapter` what it was when it was saved, its pending gradient included, bit for bit.

    Raises CheckpointError, with nothing changed, where a file is missing, differs from its checksum or is of another
    shape than the adapter.
    """
    verify(folder)
    is_snapshot = (folder / _VECTORS).exists()
    adapter.set_state(read_vectors(adapter, folder, _VECTORS) if is_snapshot else read_state(adapter, folder))
