"""Lays the rows of one pass out as tensors: tokens, targets, loss inputs. Runs no model and knows no adapter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import nan

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...wire.commands import ForwardBackwardInput
from ...wire.custom_loss import CustomLoss
from ...wire.errors import InvalidRequestError
from ...wire.types import Datum
from ..images.layout import Stretch, positions_of
from .custom_losses import evaluate_custom
from .logprobs import Targets
from .losses import LossInputs, evaluate, sequence_ratios
from .packing import Pass
from .reading import Readable

_Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Span:
    """Targets `start` to `end` share a loss and its configuration."""

    start: int
    end: int
    loss_fn: str
    config: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CustomRow:
    """Row number `row` of the pass, whose logprobs have the `shape` of its targets; `inputs` are what the loss reads
    beside them."""

    row: int
    datum: int
    loss: CustomLoss
    shape: list[int]
    inputs: list[Tensor]


@dataclass(frozen=True, slots=True)
class Found:
    """What custom losses came to: [targets] float32 each, and metrics and problems by the pass's rows."""

    losses: Tensor
    grads: Tensor
    metrics: dict[int, dict[str, float]] = field(default_factory=dict[int, dict[str, float]])
    problems: dict[int, str] = field(default_factory=dict[int, str])


@dataclass(frozen=True, slots=True)
class Batch:
    """One pass on the device. Row i of the pass owns targets `bounds[i]` to `bounds[i + 1]`."""

    tokens: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] or, with images, [3, tokens] int64, from 0 in every row
    targets: Targets
    inputs: LossInputs  # [targets]
    spans: tuple[Span, ...]
    bounds: tuple[int, ...]  # [rows + 1]
    ratio_mask: Tensor | None  # [targets] float32, there where a loss needs to know its sequence's ratio first
    customs: tuple[CustomRow, ...]  # rows with a loss of their users
    found: Found
    stretches: tuple[Stretch, ...]  # the rows, with their images

    @property
    def need_logprobs(self) -> bool:
        """Whether some losses look at whole sequences."""
        return self.ratio_mask is not None or bool(self.customs)

    def given(self, logprobs: Tensor) -> "Batch":
        """With what such losses want, of the logprobs of all targets, [targets] float32."""
        for row in self.customs:
            self._evaluate_custom(row, logprobs)
        if self.ratio_mask is None:
            return self
        lengths = torch.tensor(self.bounds, device=logprobs.device).diff()
        ratios = sequence_ratios(logprobs, self.inputs.logprobs, self.ratio_mask, lengths)
        return replace(self, inputs=replace(self.inputs, sequence_ratios=ratios))

    def evaluate(self, start: int, end: int, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and d loss / d logprob of targets `start` to `end`, [end - start] float32, by their own job's loss."""
        losses, grads = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for span in self.spans:
            first, last = max(span.start, start), min(span.end, end)
            if first < last and span.loss_fn == "custom":
                here = slice(first - start, last - start)
                losses[here], grads[here] = self.found.losses[first:last], self.found.grads[first:last]
            elif first < last:
                here = slice(first - start, last - start)
                inputs = self.inputs.slice(first, last)
                losses[here], grads[here] = evaluate(span.loss_fn, span.config, logprobs[here], inputs)
        return losses, grads

    def _evaluate_custom(self, row: CustomRow, logprobs: Tensor) -> None:
        """The whole loss counts as its first target's."""
        start, end = self.bounds[row.row], self.bounds[row.row + 1]
        self.found.losses[start:end] = 0.0
        try:
            evaluated = evaluate_custom(
                f"data[{row.datum}]", row.loss, logprobs[start:end].reshape(row.shape), row.inputs
            )
        except InvalidRequestError as error:
            self.found.problems[row.row] = str(error)
            self.found.losses[start] = nan
            return
        self.found.losses[start] = evaluated.loss
        self.found.grads[start:end] = evaluated.grad.flatten()
        self.found.metrics[row.row] = evaluated.metrics


def lay_out(rows: Pass, jobs: Sequence[Readable], device: torch.device) -> Batch:
    """`jobs[row.job]` holds the datum of each row."""
    data = [jobs[row.job].request.data[row.datum] for row in rows.rows]
    read = [jobs[row.job].rows[row.datum] for row in rows.rows]
    stretches = tuple(Stretch(0, len(row.ids), row.images) for row in read)
    lengths = [row.length for row in rows.rows]
    widths = [_targets(datum).size // length for datum, length in zip(data, lengths, strict=True)]  # K of [N, K]
    bounds = np.concatenate(([0], np.cumsum(np.multiply(lengths, widths)))).tolist()
    per_token = np.repeat(widths, lengths)  # [tokens]
    targets = Targets(
        tokens=_to_device([_targets(datum).ravel() for datum in data], device),
        rows=_to_device([np.repeat(np.arange(len(per_token)), per_token)], device),
        starts=np.concatenate(([0], np.cumsum(per_token))).tolist(),
    )
    return Batch(
        tokens=_to_device([np.asarray(row.ids, dtype=np.int64) for row in read], device).clamp_(min=0),
        positions=torch.from_numpy(positions_of(stretches)).to(device),
        targets=targets,
        inputs=LossInputs(
            weights=_to_device([_weights(datum) for datum in data], device),
            logprobs=_to_device([_input(datum, "logprobs", 0.0) for datum in data], device),
            advantages=_to_device([_input(datum, "advantages", 0.0) for datum in data], device),
        ),
        spans=tuple(_spans(rows, [job.request for job in jobs], bounds)),
        bounds=tuple(bounds),
        ratio_mask=_ratio_mask(data, device),
        customs=tuple(_customs(rows, jobs, device)),
        found=Found(torch.zeros(bounds[-1], device=device), torch.zeros(bounds[-1], device=device)),
        stretches=stretches,
    )


def _customs(rows: Pass, jobs: Sequence[Readable], device: torch.device) -> Iterator[CustomRow]:
    for i, row in enumerate(rows.rows):
        request = jobs[row.job].request
        if request.custom is not None:
            given = request.data[row.datum].loss_fn_inputs
            inputs = [given[name].to_torch().to(device) for name in request.custom.names]
            yield CustomRow(i, row.datum, request.custom, given["target_tokens"].shape, inputs)


def _spans(rows: Pass, requests: Sequence[ForwardBackwardInput], bounds: Sequence[int]) -> Iterator[Span]:
    start = 0
    for (loss_fn, config), group in groupby(rows.rows, key=lambda row: _loss(requests[row.job])):
        end = start + sum(1 for _ in group)
        yield Span(bounds[start], bounds[end], loss_fn, config)
        start = end


def _loss(request: ForwardBackwardInput) -> tuple[str, dict[str, float]]:
    return request.loss_fn, request.loss_fn_config


def _targets(datum: Datum) -> _Array:
    return datum.loss_fn_inputs["target_tokens"].to_numpy()


def _weights(datum: Datum) -> _Array:
    """A token's term is multiplied by `weights` and by `mask`, whichever are there."""
    return _input(datum, "weights", 1.0) * _input(datum, "mask", 1.0)


def _ratio_mask(data: Sequence[Datum], device: torch.device) -> Tensor | None:
    if not any("sequence_ratio_mask" in datum.loss_fn_inputs for datum in data):
        return None
    return _to_device([_input(datum, "sequence_ratio_mask", 0.0) for datum in data], device)


def _input(datum: Datum, name: str, default: float) -> npt.NDArray[np.float32]:
    """[targets], in row-major order."""
    tensor = datum.loss_fn_inputs.get(name)
    if tensor is None:
        return np.full(_targets(datum).size, default, dtype=np.float32)
    return tensor.to_numpy().astype(np.float32, copy=False).ravel()


def _to_device(arrays: Sequence[_Array], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(device)
