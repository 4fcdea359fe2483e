"""Executes training commands that came together: decodes them, runs them phase by phase, encodes their results.

What is wrong with a command fails that command alone. It knows neither sockets nor turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import structlog
import torch
from msgspec.structs import replace

from ...wire.actor_messages import Item, Outcome, Share
from ...wire.codec import decode, encode
from ...wire.commands import PHASES, ForwardBackwardInput, OptimStepInput
from ...wire.errors import (
    CheckpointError,
    InternalError,
    LorryError,
    NonFiniteError,
    OutOfMemoryError,
    StorageError,
)
from ...wire.ids import FutureId
from ...wire.types import AdamParams, ForwardBackwardOutput
from ..adapters.checkpoints import load_state, save_sampler_weights, save_state
from ..adapters.residents import Residents
from ..adapters.samplers import Saved
from ..adapters.shares import PartResult, PartSave, WeightsSave
from ..model.lora import LoraTargets
from ..model.memory import memory_ran_out
from .engine import Engine, ForwardBackwardJob
from .sharing import chosen_for, gather

log = structlog.get_logger("lorry.actor")

Work: TypeAlias = Sequence[tuple[Item, bytes]]
COPIES_AT_ONCE = 2
"""Of what is written while training goes on; more is written before it does."""
Ended: TypeAlias = tuple[Outcome, bytes]
"""How a command ended, with its result."""


class Save(Protocol):
    """What a command leaves in a folder, from copies: it ends once that is written."""

    @property
    def run(self) -> str: ...

    @property
    def future(self) -> FutureId: ...

    @property
    def folder(self) -> str: ...

    def write(self) -> Saved:
        """From any thread; `written` is to be told of it."""
        ...


class Trainer:
    """`base_model` is the public name that checkpoints are to carry. `copies` are under way to the disk.
    `trained_tokens` counts those that were trained here."""

    def __init__(self, engine: Engine, residents: Residents, targets: LoraTargets, base_model: str) -> None:
        self._engine, self._residents, self._targets, self.base_model = engine, residents, targets, base_model
        self.copies = self.trained_tokens = 0

    def run(self, work: Work) -> dict[FutureId, Ended | Save]:
        """How each command ended: all of a phase together, phase after phase. Or what of it is still to be written."""
        ended: dict[FutureId, Ended | Save] = {}
        copies = {item.adapter.key: item.adapter for item, _ in work if item.adapter and _is_part(item)}
        runs = {item.adapter.key: item.adapter for item, _ in work if item.adapter and not _is_part(item)}
        problems = self._residents.hold_runs(runs.values()) | self._residents.hold_copies(copies.values())
        try:
            for item, _ in work:
                if problem := problems.get(_run_of(item)):
                    unrestored = isinstance(problem, CheckpointError) and not _is_part(item)
                    ended[item.future] = _failed(item, problem, unrestored=unrestored)
            able = [pair for pair in work if _run_of(pair[0]) not in problems]
            for phase in sorted({PHASES[item.kind] for item, _ in able}):
                chosen = [pair for pair in able if PHASES[pair[0].kind] == phase]
                for (item, payload), end in zip(chosen, self._phase(chosen), strict=True):
                    ended[item.future] = end
                    if item.share is None:
                        self._residents.executed(item, len(payload))
                    if item.kind == "save_state" and isinstance(end, tuple) and end[0].error is None:
                        self._residents.saved(item)
            return ended
        finally:
            self._residents.release([*runs, *copies])

    def written(self, saved: Saved) -> None:
        self.copies -= 1
        if saved.outcome.error is not None:
            self._residents.forget_copy(saved.folder)

    def _phase(self, chosen: Work) -> Sequence[Ended | Save]:
        kind = chosen[0][0].kind
        if kind in ("forward", "forward_backward"):
            return self._compute(chosen)
        if kind == "optim_step":
            return self._optim_step(chosen)
        return [self._save_or_load(item) for item, _ in chosen]

    def _compute(self, chosen: Work) -> list[Ended | Save]:
        ended: dict[FutureId, Ended | Save] = {}
        passes: list[tuple[Item, bytes]] = []
        for item, payload in chosen:
            if item.share is None or item.share.stage == "part":
                passes.append((item, payload))
            elif item.share.stage == "publish":
                ended[item.future] = self._publish(item, item.share)
            else:
                ended[item.future] = self._gather(item, item.share)
        for (item, _), end in zip(passes, self._guarded(passes) if passes else (), strict=True):
            ended[item.future] = end if item.share is None else self._part(item, item.share, end)
        return [ended[item.future] for item, _ in chosen]

    def _publish(self, item: Item, share: Share) -> Ended | Save:
        adapter = self._residents.get(_run_of(item))
        return self._beside(WeightsSave(_run_of(item), item.future, share.folders[0], adapter.weights_copy()))

    def _part(self, item: Item, share: Share, end: Ended) -> Ended | Save:
        """The gradient leaves the copy of the run with it."""
        outcome, result = end
        if outcome.error is not None:
            return end
        adapter = self._residents.get(_run_of(item))
        grad = adapter.grad.detach().to("cpu", copy=True) if adapter.pending else None
        adapter.discard()
        return self._beside(PartSave(_run_of(item), share.folders[0], outcome, result, grad))

    def _gather(self, item: Item, share: Share) -> Ended:
        backward, pause = item.kind == "forward_backward", self._engine.base.in_flight.pause
        adapter, folders = self._residents.get(_run_of(item)), [Path(folder) for folder in share.folders]
        try:
            output, payload_bytes = gather(adapter, folders, backward=backward, pause=pause)
        except LorryError as error:
            return _failed(item, error)
        except (RuntimeError, MemoryError) as error:
            if not memory_ran_out(error):
                raise
            return _failed(item, OutOfMemoryError("the gradients of its parts do not fit into the actor's memory"))
        self._residents.executed(item, payload_bytes)
        return _counted(item, output), encode(output)

    def _beside(self, save: Save) -> Ended | Save:
        """It is written while training goes on, unless too much is."""
        if self.copies < COPIES_AT_ONCE:
            self.copies += 1
            return save
        return save.write().outcome, b""

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
        prepared = [self._prepare(*one) for one in chosen]
        jobs = [each.job for each in prepared if isinstance(each.job, ForwardBackwardJob)]
        outcomes = iter(self._engine.forward_backward(jobs))
        ends: list[Ended] = []
        for (item, payload), each in zip(chosen, prepared, strict=True):
            result = next(outcomes) if isinstance(each.job, ForwardBackwardJob) else each.job
            if isinstance(result, LorryError):
                ends.append(_failed(item, result))
                continue
            outcome = _counted(item, result)
            self.trained_tokens += outcome.train_tokens
            whole = result if each.chosen is None else PartResult(each.chosen, result, len(payload))
            ends.append((outcome, encode(whole)))
        return ends

    def _prepare(self, item: Item, payload: bytes) -> "_Prepared":
        try:
            request, chosen = decode(payload, ForwardBackwardInput), None
            if item.share is not None:
                chosen = chosen_for(request.data, item.share.index, item.share.parts)
                request = replace(request, data=[request.data[i] for i in chosen])
            if chosen == []:
                return _Prepared(ForwardBackwardOutput("ArrayRecord", [], {}), chosen)
            return _Prepared(ForwardBackwardJob(_run_of(item), request, item.kind == "forward_backward"), chosen)
        except LorryError as error:
            return _Prepared(error)

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
                ends.append((Outcome(item.future, metrics=result.metrics), encode(result)))
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

    def _save_or_load(self, item: Item) -> Ended | Save:
        assert item.folder is not None
        if item.kind == "save_weights_for_sampler" and self.copies < COPIES_AT_ONCE:
            return self._beside(self._residents.copy_for_sampling(item, self.base_model))
        folder = Path(item.folder)
        try:
            adapter = self._residents.get(_run_of(item))
            if item.kind == "load_state":
                load_state(adapter, folder, optimizer=item.optimizer)
                return Outcome(item.future), b""
            save = save_state if item.kind == "save_state" else save_sampler_weights
            facts = save(adapter, self._targets, folder, self.base_model)
            return Outcome(item.future, size_bytes=facts.size_bytes, checksum=facts.sha256), b""
        except LorryError as error:
            return _failed(item, error)
        except OSError as error:
            return _failed(item, StorageError(f"{item.kind} in {folder}: {error}"))


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is to be computed of a command, what is wrong with it, or what comes of it where there is nothing to
    compute; and of one that is spread, the data that are `chosen`."""

    job: ForwardBackwardJob | ForwardBackwardOutput | LorryError
    chosen: list[int] | None = None


def _run_of(item: Item) -> str:
    assert item.adapter is not None, "training commands have one"
    return item.adapter.key


def _is_part(item: Item) -> bool:
    return item.share is not None and item.share.stage == "part"


def _counted(item: Item, output: ForwardBackwardOutput) -> Outcome:
    """One token for each logprob, or K of them: only the engine knows how many tokens an image is."""
    tokens = sum(output["logprobs"].shape[0] for output in output.loss_fn_outputs)
    if item.kind == "forward_backward":
        data = len(output.loss_fn_outputs)
        return Outcome(item.future, train_tokens=tokens, metrics=output.metrics, data=data)
    return Outcome(item.future, prefill_tokens=tokens)


def _failed(item: Item, error: object, *, discarded: bool = False, unrestored: bool = False) -> Ended:
    assert isinstance(error, LorryError)
    return Outcome(item.future, error.info, discarded=discarded, unrestored=unrestored), b""
