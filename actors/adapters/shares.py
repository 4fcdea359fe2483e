"""What actors that execute a command together pass to each other in folders: weights, parts' gradients and results.

They are written beside the compute thread, from copies, complete or not at all; nothing of them outlives the command
by much.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from torch import Tensor

from ...wire.actor_messages import Outcome
from ...wire.codec import decode
from ...wire.errors import CheckpointError, StorageError
from ...wire.ids import FutureId
from ...wire.reducing import reduced
from ...wire.types import ForwardBackwardOutput
from ..model.adapter import Adapter, TrainingState
from .folders import seal, verify, written_aside
from .samplers import Saved
from .tensors import read_tensors, write_tensors

_WEIGHTS, _GRADIENT, _RESULT = "weights.safetensors", "gradient.safetensors", "result.msgpack"


class PartResult(msgspec.Struct, frozen=True):
    """What came of the `chosen` data of a command, whose whole payload has so many bytes."""

    chosen: list[int]
    output: ForwardBackwardOutput
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class WeightsSave:
    """A run's `weights` as they are, [P] float32 on the host, for parts to be computed with elsewhere."""

    run: str
    future: FutureId
    folder: str
    weights: Tensor

    def write(self) -> Saved:
        return _written(self.run, self.folder, Outcome(self.future), {_WEIGHTS: self.weights}, None)


@dataclass(frozen=True, slots=True)
class PartSave:
    """A part of a command that was executed with a copy of its run: a PartResult, encoded, and `grad` [P] float32 on
    the host, or none."""

    run: str
    folder: str
    outcome: Outcome
    result: bytes
    grad: Tensor | None

    @property
    def future(self) -> FutureId:
        return self.outcome.future

    def write(self) -> Saved:
        tensors = {} if self.grad is None else {_GRADIENT: self.grad}
        return _written(self.run, self.folder, self.outcome, tensors, self.result)


def load_weights(adapter: Adapter, folder: Path) -> None:
    """Makes `adapter` a copy with the published weights, without moments or a gradient. Raises CheckpointError, with
    nothing changed, where they are not there, damaged or of another shape."""
    verify(folder)
    weights = read_tensors(folder / _WEIGHTS).get("weights")
    adapter.set_state(TrainingState(_fitting(weights, adapter, folder), None, None, None, step=0))


def read_part(adapter: Adapter, folder: Path, *, backward: bool) -> tuple[PartResult, Tensor | None]:
    """What came of a part, and its gradient if it has one. Raises CheckpointError as `load_weights` does."""
    verify(folder)
    try:
        result = decode((folder / _RESULT).read_bytes(), PartResult)
    except OSError as error:
        raise CheckpointError(f"{folder / _RESULT} cannot be read: {error}") from error
    if not backward or not result.chosen:
        return result, None
    return result, _fitting(read_tensors(folder / _GRADIENT).get("gradient"), adapter, folder)


def merged(results: Sequence[PartResult]) -> ForwardBackwardOutput:
    """The whole command's result. Raises CheckpointError where the parts are not each datum once."""
    found = {datum: (result, i) for result in results for i, datum in enumerate(result.chosen)}
    count = sum(len(result.chosen) for result in results)
    if sorted(found) != list(range(count)):
        raise CheckpointError(f"the parts of a command have {count} data, which are not each of its data once")
    outputs = [result.output.loss_fn_outputs[i] for result, i in (found[datum] for datum in range(count))]
    metrics = reduced((result.output.metrics, len(result.chosen)) for result in results)
    return ForwardBackwardOutput(results[0].output.loss_fn_output_type, outputs, metrics)


def _fitting(vector: Tensor | None, adapter: Adapter, folder: Path) -> Tensor:
    if vector is None or list(vector.shape) != [adapter.size]:
        raise CheckpointError(f"{folder} does not fit an adapter of {adapter.size} parameters")
    return vector


def _written(run: str, folder: str, outcome: Outcome, tensors: dict[str, Tensor], result: bytes | None) -> Saved:
    try:
        with written_aside(Path(folder)) as aside:
            for file, tensor in tensors.items():
                write_tensors(aside / file, {Path(file).stem: tensor})
            if result is not None:
                (aside / _RESULT).write_bytes(result)
            seal(aside)
    except OSError as error:
        problem = StorageError(f"what other actors are to read in {folder}: {error}")
        return Saved(run, folder, Outcome(outcome.future, problem.info))
    return Saved(run, folder, outcome)
