"""Snapshots: the service's own copies of a run's whole training state, flat as it lies in memory; no user names them.

A run is rebuilt from its newest one, or from a checkpoint of the user's, whichever is newer.
"""

from dataclasses import dataclass
from pathlib import Path

from ...wire.actor_messages import SnapshotFailed, SnapshotTaken
from ...wire.errors import CheckpointError
from ..model.adapter import Adapter, TrainingState
from .checkpoints import read_state
from .folders import read_json, read_tensors, seal, verify, write_json, write_tensors, written_aside

_VECTORS = "snapshot.safetensors"
_STATE = "state.json"
_FORMAT = 1


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
            state = snapshot.state
            vectors = {"weights": state.weights, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
            vectors["grad"] = state.grad
            write_tensors(aside / _VECTORS, {name: vector for name, vector in vectors.items() if vector is not None})
            write_json(aside / _STATE, {"format": _FORMAT, "step": state.step})
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
    adapter.set_state(_read_snapshot(adapter, folder) if is_snapshot else read_state(adapter, folder))


def _read_snapshot(adapter: Adapter, folder: Path) -> TrainingState:
    vectors, facts = read_tensors(folder / _VECTORS), read_json(folder / _STATE)
    if facts["format"] != _FORMAT:
        raise CheckpointError(f"{folder / _STATE} is of format {facts['format']}, expected {_FORMAT}")
    wanted = {"weights", "exp_avg", "exp_avg_sq"}
    if vectors.keys() - {"grad"} != wanted or any(v.shape != adapter.weights.shape for v in vectors.values()):
        raise CheckpointError(f"{folder / _VECTORS} does not fit an adapter of {adapter.size} parameters")
    return TrainingState(
        vectors["weights"], vectors["exp_avg"], vectors["exp_avg_sq"], vectors.get("grad"), facts["step"]
    )
