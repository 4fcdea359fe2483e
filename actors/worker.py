"""The compute thread of an actor: micro-batches and decode steps take turns on one device.

It reads orders from a queue and posts outcomes; it never touches a socket. Everything that a command brought is checked
here, and what is wrong with it fails that command alone.
"""

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from zlib import crc32

import structlog
import torch

from ..wire.actor_messages import CancelCommand, Completion, Forget, Item, MicroBatch, Outcome
from ..wire.codec import decode, encode
from ..wire.commands import (
    PHASES,
    ComputeLogprobsInput,
    ForwardBackwardInput,
    OptimStepInput,
    SampleInput,
    check_sample,
    check_tokens,
    phase_may_follow,
)
from ..wire.errors import CommandCancelledError, InternalError, LorryError
from ..wire.ids import BatchId, FutureId
from ..wire.types import AdamParams
from .decoder import Decoder
from .engine import Engine, ForwardBackwardJob
from .lora import LoraTargets
from .residents import Residents
from .snapshots import load_state, save_sampler_weights, save_state

log = structlog.get_logger("lorry.actor")


@dataclass(frozen=True, slots=True)
class Train:
    batch: MicroBatch
    payloads: list[bytes]


@dataclass(frozen=True, slots=True)
class Sample:
    batch: BatchId
    item: Item
    payload: bytes


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Order: TypeAlias = Train | Sample | CancelCommand | Forget | Stop
Post: TypeAlias = Callable[[Completion, list[bytes]], None]
Ended: TypeAlias = tuple[Outcome, bytes]


class Worker:
    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        residents: Residents,
        targets: LoraTargets,
        base_model: str,
        sample_share: float,
        post: Post,
    ) -> None:
        self.orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self.train_s = 0.0
        self.sample_s = 0.0
        self._engine, self._decoder, self._residents, self._targets = engine, decoder, residents, targets
        self._base_model, self._post, self._sample_share = base_model, post, sample_share
        self._train: deque[Train] = deque()
        self._samples: deque[Sample] = deque()
        self._batches: dict[FutureId, BatchId] = {}
        self._decoding: dict[FutureId, str] = {}
        self._lead_s = 0.0
        self._stopped = False

    def run(self) -> None:
        """Until a Stop order comes."""
        while not self._stopped:
            self._take_orders()
            self._admit()
            sampling_is_due = self._decoder.active and self._lead_s > 0
            started = time.perf_counter()
            if self._train and not sampling_is_due:
                self._run_micro_batches()
                self.train_s += (spent := time.perf_counter() - started)
                self._account(spent / (1 - self._sample_share))
            elif self._decoder.active:
                self._decode()
                self.sample_s += (spent := time.perf_counter() - started)
                self._account(-spent / self._sample_share)

    def _account(self, weighted_s: float) -> None:
        """Who is ahead of its share counts only while both want the device."""
        contended = bool(self._train) and self._decoder.active
        self._lead_s = self._lead_s + weighted_s if contended else weighted_s

    @property
    def swaps(self) -> int:
        return self._residents.pool.swaps_in + self._residents.pool.swaps_out

    # Orders ----------------------------------------------------------------------------------------------------------

    def _take_orders(self) -> None:
        idle = not (self._train or self._samples or self._decoder.active)
        while True:
            try:
                order = self.orders.get(block=idle)
            except queue.Empty:
                return
            idle = False
            match order:
                case Train():
                    self._train.append(order)
                case Sample():
                    self._samples.append(order)
                case CancelCommand(future):
                    self._cancel(future)
                case Forget(key):
                    self._residents.forget(key)
                case Stop():
                    self._stopped = True

    def _cancel(self, future: FutureId) -> None:
        waiting = next((s for s in self._samples if s.item.future == future), None)
        if waiting is not None:
            self._samples.remove(waiting)
            batch = waiting.batch
        elif future in self._decoding:
            self._decoder.cancel(future)
            batch = self._leave(future)
        else:
            return
        error = CommandCancelledError(f"{future} was cancelled")
        self._post(Completion(batch, [Outcome(future, error.info)], done=True), [b""])

    # Sampling --------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Requests join the decode loop, as long as their adapters fit the slots together."""
        while self._samples:
            sample = self._samples[0]
            state = sample.item.adapter
            adapters = {key for key in self._decoding.values() if key} | ({state.key} if state else set())
            if len(adapters) > self._residents.pool.slots:
                return
            self._samples.popleft()
            try:
                self._join(sample)
            except LorryError as error:
                self._post(Completion(sample.batch, [Outcome(sample.item.future, error.info)], done=True), [b""])

    def _join(self, sample: Sample) -> None:
        item, base = sample.item, self._engine.base
        key = "" if item.adapter is None else self._residents.sampler(item.adapter, set(self._decoding.values()))
        adapter = self._residents.get(key) if key else None
        seed = crc32(item.future.encode())  # the same when the command is executed again elsewhere
        if item.kind == "sample":
            request = decode(sample.payload, SampleInput)
            check_sample(request, base.vocab_size, base.max_context)
            self._decoder.add(item.future, request, adapter, seed)
        else:
            prompt = decode(sample.payload, ComputeLogprobsInput).prompt
            check_tokens("prompt", prompt, base.vocab_size, base.max_context)
            self._decoder.add_prompt(item.future, prompt, adapter)
        self._batches[item.future], self._decoding[item.future] = sample.batch, key

    def _leave(self, future: FutureId) -> BatchId:
        del self._decoding[future]
        return self._batches.pop(future)

    def _decode(self) -> None:
        self._residents.pool.acquire(sorted({key for key in self._decoding.values() if key}))
        for future, result, usage in self._decoder.step():
            failed = isinstance(result, LorryError)
            outcome = Outcome(
                future,
                result.info if failed else None,
                prefill_tokens=usage.prefill_tokens,
                sample_tokens=usage.sample_tokens,
            )
            self._post(Completion(self._leave(future), [outcome], done=True), [b"" if failed else encode(result)])

    # Training --------------------------------------------------------------------------------------------------------

    def _run_micro_batches(self) -> None:
        """All that waits and may share a pass runs together, phase by phase."""
        merged = take_together(self._train, self._engine.token_budget)
        work = [pair for train in merged for pair in zip(train.batch.items, train.payloads, strict=True)]
        ended: dict[FutureId, Ended] = {}
        for phase in sorted({PHASES[item.kind] for item, _ in work}):
            chosen = [pair for pair in work if PHASES[pair[0].kind] == phase]
            for (item, _), end in zip(chosen, self._guarded(chosen), strict=True):
                ended[item.future] = end
        for train in merged:
            ends = [ended[item.future] for item in train.batch.items]
            self._post(Completion(train.batch.batch, [o for o, _ in ends], done=True), [p for _, p in ends])

    def _guarded(self, chosen: Sequence[tuple[Item, bytes]]) -> list[Ended]:
        """Runs commands of one phase together. Should that raise, which is a bug, each runs alone, so that it fails
        alone. An accelerator in an error state does not recover: then the process ends and another takes over."""
        try:
            return self._phase(chosen)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            log.exception("internal error", commands=[item.future for item, _ in chosen])
            if len(chosen) > 1:
                return [end for one in chosen for end in self._guarded([one])]
            problem = InternalError(f"{chosen[0][0].kind} raised {type(error).__name__}: {error}")
            return [_failed(chosen[0][0], problem)]

    def _phase(self, chosen: Sequence[tuple[Item, bytes]]) -> list[Ended]:
        kind = chosen[0][0].kind
        if kind in ("forward", "forward_backward"):
            return self._forward_backward(chosen)
        if kind == "optim_step":
            return self._optim_step(chosen)
        return [self._save_or_load(item) for item, _ in chosen]

    def _forward_backward(self, chosen: Sequence[tuple[Item, bytes]]) -> list[Ended]:
        prepared: list[ForwardBackwardJob | LorryError] = [self._prepare(*one) for one in chosen]
        outcomes = iter(self._engine.forward_backward([job for job in prepared if isinstance(job, ForwardBackwardJob)]))
        ends: list[Ended] = []
        for (item, _), job in zip(chosen, prepared, strict=True):
            result = job if isinstance(job, LorryError) else next(outcomes)
            if isinstance(job, LorryError) or isinstance(result, LorryError):
                ends.append(_failed(item, result))
                continue
            tokens = sum(datum.model_input.length for datum in job.request.data)
            trained = item.kind == "forward_backward"
            outcome = Outcome(
                item.future, train_tokens=tokens if trained else 0, prefill_tokens=0 if trained else tokens
            )
            ends.append((outcome, encode(result)))
        return ends

    def _prepare(self, item: Item, payload: bytes) -> ForwardBackwardJob | LorryError:
        try:
            assert item.adapter is not None
            key = self._residents.run(item.adapter)
            return ForwardBackwardJob(key, decode(payload, ForwardBackwardInput), item.kind == "forward_backward")
        except LorryError as error:
            return error

    def _optim_step(self, chosen: Sequence[tuple[Item, bytes]]) -> list[Ended]:
        prepared = [self._prepare_step(*one) for one in chosen]
        outcomes = iter(self._engine.optim_step([step for step in prepared if not isinstance(step, LorryError)]))
        ends: list[Ended] = []
        for (item, _), step in zip(chosen, prepared, strict=True):
            result = step if isinstance(step, LorryError) else next(outcomes)
            failed = isinstance(result, LorryError)
            ends.append(_failed(item, result) if failed else (Outcome(item.future), encode(result)))
        return ends

    def _prepare_step(self, item: Item, payload: bytes) -> tuple[str, AdamParams] | LorryError:
        try:
            assert item.adapter is not None
            return self._residents.run(item.adapter), decode(payload, OptimStepInput).adam_params
        except LorryError as error:
            return error

    def _save_or_load(self, item: Item) -> Ended:
        assert item.adapter is not None and item.folder is not None
        folder = Path(item.folder)
        try:
            adapter = self._residents.get(self._residents.run(item.adapter))
            if item.kind == "load_state":
                load_state(adapter, folder, optimizer=item.optimizer)
                return Outcome(item.future), b""
            save = save_state if item.kind == "save_state" else save_sampler_weights
            facts = save(adapter, self._targets, folder, self._base_model)
            return Outcome(item.future, size_bytes=facts.size_bytes, checksum=facts.sha256), b""
        except LorryError as error:
            return _failed(item, error)


def take_together(waiting: deque[Train], token_budget: int) -> list[Train]:
    """Remove and return the first micro-batch, and those right behind it that may run in the same pass.

    Together they stay within `token_budget`, and no run's commands go back a phase: its order holds.
    """
    taken: list[Train] = []
    tokens = 0
    phases: dict[str, int] = {}
    while waiting:
        batch = waiting[0].batch
        tokens += batch.tokens
        apart = batch.alone or tokens > token_budget or not _phases_go_on(batch, phases)
        if taken and (apart or taken[0].batch.alone):
            break
        phases |= {item.adapter.key: PHASES[item.kind] for item in batch.items if item.adapter}
        taken.append(waiting.popleft())
    return taken


def _phases_go_on(batch: MicroBatch, reached: dict[str, int]) -> bool:
    first: dict[str, int] = {}
    for item in batch.items:
        if item.adapter:
            first.setdefault(item.adapter.key, PHASES[item.kind])
    return all(phase_may_follow(phase, reached.get(key, 0)) for key, phase in first.items())


def _failed(item: Item, error: object) -> Ended:
    assert isinstance(error, LorryError)
    return Outcome(item.future, error.info), b""
