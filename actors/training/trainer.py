"""Executes training commands that came together: decodes them, runs them phase by phase, encodes their results.

What is wrong with a command fails that command alone. It knows neither sockets nor turns.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import structlog
import torch

from ...wire.actor_messages import Item, Outcome
from ...wire.codec import decode, encode
from ...wire.commands import PHASES, ForwardBackwardInput, OptimStepInput
from ...wire.errors import CheckpointError, InternalError, LorryError, NonFiniteError, StorageError
from ...wire.ids import FutureId
from ...wire.types import AdamParams
from ..adapters.checkpoints import load_state, save_sampler_weights, save_state
from ..adapters.residents import Residents
from ..adapters.samplers import SamplerSave, SamplerSaved, write_sampler_weights
from ..model.lora import LoraTargets
from .engine import Engine, ForwardBackwardJob

log = structlog.get_logger("lorry.actor")

Work: TypeAlias = Sequence[tuple[Item, bytes]]
COPIES_AT_ONCE = 2
"""Of weights to sample from, which are written while training goes on; further ones are written before it does."""
Ended: TypeAlias = tuple[Outcome, bytes]
"""How a command ended, with its result."""


class Trainer:
    """`base_model` is the public name that checkpoints are to carry. `copies` are under way to the disk."""

    def __init__(self, engine: Engine, residents: Residents, targets: LoraTargets, base_model: str) -> None:
        self._engine, self._residents, self._targets, self._base_model = engine, residents, targets, base_model
        self.copies = 0

    def run(self, work: Work) -> dict[FutureId, Ended | SamplerSave]:
        """How each command ended: all of a phase together, phase after phase. Or what of it is still to be written."""
        ended: dict[FutureId, Ended | SamplerSave] = {}
        runs = {item.adapter.key: item.adapter for item, _ in work if item.adapter}
        problems = self._residents.hold_runs(runs.values())
        try:
            for item, _ in work:
                if problem := problems.get(_run_of(item)):
                    ended[item.future] = _failed(item, problem, unrestored=isinstance(problem, CheckpointError))
            able = [pair for pair in work if _run_of(pair[0]) not in problems]
            for phase in sorted({PHASES[item.kind] for item, _ in able}):
                chosen = [pair for pair in able if PHASES[pair[0].kind] == phase]
                for (item, payload), end in zip(chosen, self._phase(chosen), strict=True):
                    ended[item.future] = end
                    self._residents.executed(item, len(payload))
                    if item.kind == "save_state" and isinstance(end, tuple) and end[0].error is None:
                        self._residents.saved(item)
            return ended
        finally:
            self._residents.release(runs)

    def write(self, save: SamplerSave) -> SamplerSaved:
        """From any thread; `written` is to be told of it."""
        return write_sampler_weights(save, self._targets, self._base_model)

    def written(self, saved: SamplerSaved) -> None:
        self.copies -= 1
        if saved.outcome.error is not None:
            self._residents.forget_copy(saved.folder)

    def _phase(self, chosen: Work) -> Sequence[Ended | SamplerSave]:
        kind = chosen[0][0].kind
        if kind in ("forward", "forward_backward"):
            return self._guarded(chosen)
        if kind == "optim_step":
            return self._optim_step(chosen)
        return [self._save_or_load(item) for item, _ in chosen]

    def _guarded(self, chosen: Work) -> list[Ended]:
        """Should a pass raise, which is a bug, its gradients have been rolled back: each command runs again alone, so
        that it fails alone. An accelerator in an error state does not recover: then, as for a bug anywhere else, the
        process ends, and another rebuilds what it held."""
        try:
            return self._forward_backward(chosen)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            log.exception("internal error", commands=[item.future for item, _ in chosen])
            if len(chosen) > 1:
                return [end for one in chosen for end in self._guarded([one])]
            return [_failed(chosen[0][0], InternalError(f"{chosen[0][0].kind} raised {type(error).__name__}: {error}"))]

    def _forward_backward(self, chosen: Work) -> list[Ended]:
        prepared: list[ForwardBackwardJob | LorryError] = [self._prepare(*one) for one in chosen]
        outcomes = iter(self._engine.forward_backward([job for job in prepared if isinstance(job, ForwardBackwardJob)]))
        ends: list[Ended] = []
        for (item, _), job in zip(chosen, prepared, strict=True):
            result = job if isinstance(job, LorryError) else next(outcomes)
            if isinstance(job, LorryError) or isinstance(result, LorryError):
                ends.append(_failed(item, result))
                continue
            # One for each token, or K: only the engine knows how many tokens an image is.
            tokens = sum(output["logprobs"].shape[0] for output in result.loss_fn_outputs)
            trained = item.kind == "forward_backward"
            outcome = Outcome(
                item.future, train_tokens=tokens if trained else 0, prefill_tokens=0 if trained else tokens
            )
            ends.append((outcome, encode(result)))
        return ends

    def _prepare(self, item: Item, payload: bytes) -> ForwardBackwardJob | LorryError:
        try:
            request = decode(payload, ForwardBackwardInput)
            return ForwardBackwardJob(_run_of(item), request, item.kind == "forward_backward")
        except LorryError as error:
            return error

    def _optim_step(self, chosen: Work) -> list[Ended]:
        prepared = [self._prepare_step(*one) for one in chosen]
        outcomes = iter(self._engine.optim_step([step for step in prepared if isinstance(step, tuple)]))
        ends: list[Ended] = []
        for (item, _), step in zip(chosen, prepared, strict=True):
            result = next(outcomes) if isinstance(step, tuple) else step
            if result is None:
                ends.append((Outcome(item.future, discarded=True), b""))
            elif isinstance(result, LorryError):
                ends.append(_failed(item, result, discarded=isinstance(result, NonFiniteError)))
            else:
                ends.append((Outcome(item.future), encode(result)))
        return ends

    def _prepare_step(self, item: Item, payload: bytes) -> tuple[str, AdamParams] | LorryError | None:
        """None where nothing is left to compute: the gradient is discarded."""
        try:
            if item.discard:
                self._residents.get(_run_of(item)).discard()
                return None
            return _run_of(item), decode(payload, OptimStepInput).adam_params
        except LorryError as error:
            return error

    def _save_or_load(self, item: Item) -> Ended | SamplerSave:
        assert item.folder is not None
        if item.kind == "save_weights_for_sampler" and self.copies < COPIES_AT_ONCE:
            self.copies += 1
            return self._residents.copy_for_sampling(item)
        folder = Path(item.folder)
        try:
            adapter = self._residents.get(_run_of(item))
            if item.kind == "load_state":
                load_state(adapter, folder, optimizer=item.optimizer)
                return Outcome(item.future), b""
            save = save_state if item.kind == "save_state" else save_sampler_weights
            facts = save(adapter, self._targets, folder, self._base_model)
            return Outcome(item.future, size_bytes=facts.size_bytes, checksum=facts.sha256), b""
        except LorryError as error:
            return _failed(item, error)
        except OSError as error:
            return _failed(item, StorageError(f"{item.kind} in {folder}: {error}"))


def _run_of(item: Item) -> str:
    assert item.adapter is not None, "training commands have one"
    return item.adapter.key


def _failed(item: Item, error: object, *, discarded: bool = False, unrestored: bool = False) -> Ended:
    assert isinstance(error, LorryError)
    return Outcome(item.future, error.info, discarded=discarded, unrestored=unrestored), b""
