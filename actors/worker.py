"""The compute thread of an actor: the products of training passes and decode steps take turns on one device.

It reads orders from a queue and posts outcomes; it never touches a socket. Everything that a command brought is checked
here, and what is wrong with it fails that command alone.
"""

import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

import structlog
import torch

from ..wire.actor_messages import (
    ActorLeft,
    ActorPing,
    CancelCommand,
    Completion,
    FromActor,
    Made,
    Outcome,
    SnapshotFailed,
    SnapshotRecorded,
    SnapshotTaken,
)
from ..wire.codec import encode
from ..wire.errors import CommandCancelledError, InternalError, LorryError, OutOfMemoryError
from ..wire.ids import FutureId
from ..wire.tracing import tracing
from .adapters.residents import Residents
from .adapters.samplers import Saved
from .adapters.snapshots import write_snapshot
from .arrivals import Arrivals
from .device_time import with_device_time
from .model.memory import held_on, memory_ran_out
from .orders import Leave, Order, PixelsCame, Sample, Stop, Train, changed_by, runs_of, take_together
from .outbox import End, Outbox
from .pace import Pace
from .progress import Progress
from .sampling.decoder import Decoder, Finished
from .sampling.sequences import Usage
from .spans import Spans
from .training.engine import Engine
from .training.trainer import Ended, Save, Trainer
from .turns import Turns

log = structlog.get_logger("lorry.actor")


LINGER_SHARE = 0.1
Job: TypeAlias = Callable[[], Order]
"""What is to be done beside the compute thread, which gets what comes of it."""


class Post(Protocol):
    """Sends a message to the broker, from any thread."""

    def __call__(self, message: FromActor, payloads: Sequence[bytes] = ()) -> None: ...


class Worker:
    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        residents: Residents,
        trainer: Trainer,
        sample_share: float,
        post: Post,
        write: Callable[[Job], None],
        progress: Progress,
        saving: Progress,
        outbox: Outbox,
    ) -> None:
        """`progress` is of the compute thread, `saving` of copies of weights on their way to the disk. `outbox` is what
        the residents tell of snapshots by, too."""
        self.progress, self.saving = progress, saving
        self.orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self.train_s = 0.0
        self.sample_s = 0.0
        self._engine, self._decoder, self._residents, self._trainer = engine, decoder, residents, trainer
        self._spans = Spans(tracing, trainer.base_model)
        self._told, self._write, self._turns = post, write, Turns(sample_share)
        self._in_flight = engine.base.in_flight
        self._in_flight.on_pause, self._in_flight.wait_for = self._pause, self._wait_for
        self._train: deque[Train] = deque()
        self._arrivals = Arrivals(engine.base, decoder, residents, self._refuse, progress.got_on)
        if engine.base.eyes is not None:
            engine.base.eyes.pixels_came = lambda: self.orders.put(PixelsCame())
        self._training_since = 0.0
        self._last_runs = 0
        self._last_pass_s = 0.0
        self._pace = Pace(engine.token_budget // 16)
        self._is_short = False
        self._outbox = outbox
        self._leaving = self._stopped = False

    def run(self) -> None:
        """Until a Stop order comes, or all is done after a Leave."""
        while not (self._stopped or (self._leaving and self._is_idle and self._save_all())):
            self._take_orders()
            self.progress.got_on()
            self._admit()
            if self._train and not (self._decoder.active and self._turns.sampling_is_due):
                self._run_micro_batches()
            elif self._decoder.active:
                self._decode(contended=bool(self._train))
            self._residents.make_room()
            if snapshot := self._residents.due_snapshot():
                self._write(partial(write_snapshot, snapshot))
        if not self._stopped:
            self._post(ActorLeft())

    def _save_all(self) -> bool:
        """False where some must wait: for their turn, or for the name of a folder."""
        for key in self._residents.unsaved():
            self.progress.got_on()
            self._residents.save(key)
        return self._residents.all_saved and self._trainer.copies == 0

    @property
    def _is_idle(self) -> bool:
        return not (self._train or self._arrivals or self._decoder.active)

    @property
    def measured(self) -> ActorPing:
        """What the broker is told with each heartbeat; from any thread."""
        slots, cache = self._residents.pool, self._decoder.pool
        return ActorPing(
            round(self.train_s, 3),
            round(self.sample_s, 3),
            slots.swaps_in + slots.swaps_out,
            slots.used,
            cache.blocks,
            cache.blocks - cache.free,
            cache.kept,
            held_on(self._engine.base.device),
        )

    # Orders ----------------------------------------------------------------------------------------------------------

    def _take_orders(self) -> None:
        """Take all orders that are there; with nothing to do, wait for one, or until a run is to be saved."""
        waits = self._arrivals.await_pixels and not (self._train or self._decoder.active)
        if self._is_idle or waits:
            if self._is_idle:
                self.progress.rests()
            try:
                self._sort(self.orders.get(timeout=self._residents.due_in_s()))
            except queue.Empty:
                return
            self._wait_for_company()
        self._take_orders_there()

    def _take_orders_there(self) -> None:
        while True:
            try:
                self._sort(self.orders.get_nowait())
            except queue.Empty:
                return

    def _wait_for_company(self) -> None:
        """Runs in step with each other send their next commands within moments, after their results. The first is
        held until as many runs are there as ran together last, for a tenth of the time that took at the most."""
        until = time.perf_counter() + LINGER_SHARE * self._last_pass_s
        while self._train and len(runs_of(self._train)) < self._last_runs:
            try:
                self._sort(self.orders.get(timeout=max(0.0, until - time.perf_counter())))
            except queue.Empty:
                return

    def _sort(self, order: Order) -> None:
        match order:
            case Train():
                self._train.append(order)
            case Sample():
                self._spans.sampled(order.item)
                self._arrivals.add(order)
            case PixelsCame():
                pass
            case CancelCommand(future):
                self._cancel(future)
            case SnapshotTaken() | SnapshotFailed():
                self._residents.written(order)
            case Saved():
                self._saved(order)
            case SnapshotRecorded(run, next_folder):
                self._residents.recorded(run, next_folder)
            case Leave():
                self._leaving = True
            case Stop():
                self._stopped = True

    def _cancel(self, future: FutureId) -> None:
        if (cancelled := self._arrivals.cancel(future)) is None:
            return
        (batch, usage), error = cancelled, CommandCancelledError(f"{future} was cancelled")
        outcome = Outcome(future, error.info)
        if usage is not None:  # nobody is billed for it; its tenant had the device all the same
            computed = usage.prefill_tokens - usage.cached_tokens
            outcome = Outcome(future, error.info, computed, usage.sample_tokens)
        self._post(Completion(batch, [outcome], done=True), [b""])

    # Sampling --------------------------------------------------------------------------------------------------------

    def _admit(self, *, in_pause: bool = False) -> None:
        """While training waits too, images are looked at in sampling's turn, and one at a time."""
        contended = in_pause or bool(self._train)
        look = not contended or (self._turns.sampling_is_due and not self._is_short)
        one = contended or self._decoder.active
        spent = self._arrivals.admit(look=look, one=one, others_hold_memory=in_pause)
        self._is_short, self._arrivals.is_short = self._is_short or self._arrivals.is_short, False
        if spent:
            self.sample_s += spent
            self._turns.sampled(spent, contended)

    def _decode(self, contended: bool, *, in_pause: bool = False) -> None:
        """`in_pause`, the pass of training that was set aside holds memory that is free after it."""
        self.progress.got_on()
        started = time.perf_counter()
        if self._fetch_adapters(in_pause):
            finished = self._step(in_pause)
            if made := self._decoder.pieces():
                futures = [cast(FutureId, key) for key, _ in made]
                self._post(Made(futures), [encode(pieces) for _, pieces in made])
            self._end(finished)
        self.sample_s += (spent := time.perf_counter() - started)
        self._turns.sampled(spent, contended)

    def _end(self, finished: Sequence[Finished]) -> None:
        for key, result, usage in finished:
            future = cast(FutureId, key)
            failed = isinstance(result, LorryError)
            outcome = Outcome(
                future,
                result.info if failed else None,
                prefill_tokens=usage.prefill_tokens,
                sample_tokens=usage.sample_tokens,
                cached_prefill_tokens=usage.cached_tokens,
            )
            batch = self._arrivals.leave(future)
            self._post(Completion(batch, [outcome], done=True), [b"" if failed else encode(result)])

    def _fetch_adapters(self, in_pause: bool) -> bool:
        """Those that are sampled from, onto the device: whether they are there. Where one does not fit into its memory,
        its requests end, or all wait until a pass that was set aside is over."""
        pool, wanted = self._residents.pool, sorted(self._arrivals.adapters)
        while True:
            try:
                pool.acquire(wanted)
                return True
            except (RuntimeError, MemoryError) as error:
                if not memory_ran_out(error):
                    raise
            if in_pause:
                self._is_short = True
                return False
            lacking = next(key for key in wanted if key not in pool.hot)
            log.warning("memory ran out", adapter=lacking)
            wanted.remove(lacking)
            failure = OutOfMemoryError(
                f"the adapter does not fit into the actor's memory beside {len(pool.hot)} others"
            )
            those = [future for future, key in self._arrivals.decoding.items() if key == lacking]
            for future in those:
                self._decoder.cancel(future)
            self._end([(future, failure, Usage(0, 0)) for future in those])

    def _step(self, in_pause: bool) -> list[Finished]:
        """The decoder ends requests that raise, for want of memory or by a bug, by themselves. What it cannot tell
        apart ends all that were in the step, and only those."""
        try:
            finished = self._decoder.step(others_hold_memory=in_pause)
            self._is_short = in_pause and self._decoder.postponed
            return finished
        except torch.AcceleratorError:
            raise
        except Exception as error:
            together = list(self._arrivals.decoding)
            log.exception("decoding failed", requests=together)
            problem = f"decoding {len(together)} requests together raised {type(error).__name__}: {error}"
            for future in together:
                self._decoder.cancel(future)
            failure = OutOfMemoryError(problem) if memory_ran_out(error) else InternalError(problem)
            return [(future, failure, Usage(0, 0)) for future in together]

    # Training --------------------------------------------------------------------------------------------------------

    def _run_micro_batches(self) -> None:
        """All that waits and may share a pass runs together."""
        merged = take_together(self._train, self._engine.token_budget)
        self._last_runs, self._is_short = len(runs_of(merged)), False
        self._in_flight.beside_others = self._decoder.active
        self._training_since, trained_s, tokens = time.perf_counter(), self.train_s, self._trainer.trained_tokens
        self._spans.trained([item for train in merged for item in train.batch.items])
        ended = self._trainer.run([pair for t in merged for pair in zip(t.batch.items, t.payloads, strict=True)])
        self._account_training()
        self._last_pass_s = self.train_s - trained_s
        self._pace.measured(self._trainer.trained_tokens - tokens, self._last_pass_s)
        ended |= with_device_time(ended, self._last_pass_s)
        self._residents.charge(changed_by(merged), self._last_pass_s)
        self._charge_gathered(merged, ended)
        for train in merged:
            ends = self._ends_of(train, ended)
            replay_s = {run: round(self._residents.replay_s(run), 3) for run in changed_by([train])}
            outcomes, pace = [outcome for outcome, _ in ends], round(self._pace.tokens_per_s, 3)
            completion = Completion(train.batch.batch, outcomes, done=True, replay_s=replay_s, tokens_per_s=pace)
            self._post(completion, [p for _, p in ends])

    def _charge_gathered(self, merged: Sequence[Train], ended: Mapping[FutureId, Ended | Save]) -> None:
        """What others computed of a command would be computed here alone, should it be repeated."""
        for item in (item for train in merged for item in train.batch.items):
            end = ended[item.future]
            if item.share is not None and item.share.stage == "gather" and item.adapter and isinstance(end, tuple):
                pace = self._pace.tokens_per_s
                self._residents.charge([item.adapter.key], end[0].train_tokens / pace if pace else 0.0)

    def _ends_of(self, train: Train, ended: Mapping[FutureId, Ended | Save]) -> list[Ended]:
        """Those that may be told now; the outbox keeps the others."""
        told: list[Ended] = []
        for item in train.batch.items:
            assert item.adapter is not None
            run, batch, end = item.adapter.key, train.batch.batch, ended[item.future]
            if not isinstance(end, tuple):
                self._outbox.wait_for(run, batch, item.future)
                self.saving.got_on()
                self._write(end.write)
            elif not self._outbox.keeps(run, End(batch, *end)):
                told.append(end)
        return told

    def _saved(self, saved: Saved) -> None:
        self._trainer.written(saved)
        self.saving.got_on() if self._trainer.copies else self.saving.rests()
        for told in self._outbox.ended(saved.run, saved.outcome):
            if isinstance(told, End):
                self._post(Completion(told.batch, [told.outcome], done=False), [told.payload])
            else:
                self._post(told)

    def _pause(self) -> None:
        """Requests join and leave, and sequences get their tokens, while the rest of a pass waits."""
        self.progress.got_on()
        self._account_training()
        if not self.orders.empty():
            self._take_orders_there()
        self._admit(in_pause=True)
        if self._decoder.active and self._turns.sampling_is_due:
            with self._in_flight.set_aside():
                while self._may_decode() and self._turns.sampling_is_due:
                    self._decode(contended=True, in_pause=True)
        self._in_flight.beside_others = self._decoder.active
        self._training_since = time.perf_counter()

    def _wait_for(self, pixels: Future[Any]) -> None:
        """Training has nothing to compute until they are there: others have the device meanwhile, and it counts for
        nobody's turn."""
        self._account_training()
        while not pixels.done():
            if self._may_decode():
                self._decode(contended=False)
            else:
                self._sort(self.orders.get())  # that pixels came, at the latest
            self._take_orders_there()
            self._arrivals.admit(look=False, one=True)
        self._training_since = time.perf_counter()

    def _post(self, message: FromActor, payloads: Sequence[bytes] = ()) -> None:
        self._spans.told(message)
        self._told(message, payloads)

    def _refuse(self, sample: Sample, error: LorryError) -> None:
        self._post(Completion(sample.batch, [Outcome(sample.item.future, error.info)], done=True), [b""])

    def _may_decode(self) -> bool:
        """Beside a pass under way there may be no slots, or too little memory, for those that decode."""
        room = self._residents.pool.has_room(self._arrivals.adapters)
        return self._decoder.active and room and not self._is_short

    def _account_training(self) -> None:
        """The seconds since training had the device."""
        if self._decoder.active and self._engine.base.device.type != "cpu":
            torch.accelerator.synchronize(self._engine.base.device)
        spent = time.perf_counter() - self._training_since
        self.train_s += spent
        self._turns.trained(spent, self._decoder.active or bool(self._arrivals))
