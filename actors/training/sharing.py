"""A command's data divided among several actors, and what they found put together at its run's home."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ...wire.commands import planned_length
from ...wire.errors import NonFiniteError
from ...wire.types import Datum, ForwardBackwardOutput
from ..adapters.shares import PartResult, merged, read_part
from ..model.adapter import Adapter
from .adam import all_finite


def chosen_for(data: Sequence[Datum], index: int, parts: int) -> list[int]:
    """Which data are the part of that index, in order. Every actor finds the same: the longest first, each goes to the
    part that has the fewest tokens so far."""
    tokens = [0] * parts
    chosen: list[int] = []
    lengths = [planned_length(datum.model_input) for datum in data]
    for i in sorted(range(len(data)), key=lambda i: -lengths[i]):
        part = tokens.index(min(tokens))
        tokens[part] += lengths[i]
        if part == index:
            chosen.append(i)
    return sorted(chosen)


def gather(
    adapter: Adapter, folders: Sequence[Path], *, backward: bool, pause: Callable[[], None]
) -> tuple[ForwardBackwardOutput, int]:
    """Adds the parts' gradients to the adapter's, in their order, and returns the whole result and the bytes that the
    command had. Raises CheckpointError and NonFiniteError, as whatever else, with nothing changed.

    Others have the device in each `pause`.
    """
    results: list[PartResult] = []
    adapter.mark()
    try:
        for folder in folders:
            result, grad = read_part(adapter, folder, backward=backward)
            results.append(result)
            if grad is not None:
                adapter.grad.add_(grad.to(adapter.device))
            pause()
        output = merged(results)
        if backward and not all_finite([adapter.grad])[0]:
            raise NonFiniteError("the sum of the gradients of its parts is not finite", field="data")
    except BaseException:
        adapter.rollback()
        raise
    adapter.pending = adapter.pending or backward
    adapter.commit()
    return output, max(result.payload_bytes for result in results)
