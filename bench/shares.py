"""How far apart the tokens of decoding sequences are while training goes on, on the model of 41.6 M parameters.

Sequences decode, first alone, then beside runs that always have a `forward_backward` waiting. With a share s of the
device the time between two tokens is to be 1 / s times as long at most, at the 95th percentile. Prints a table and a
JSON line.
"""

import argparse
import itertools
import json
import queue
import statistics
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from threading import Thread
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.table import Table

from bench.engine import VOCAB, build_model, datum, ratios
from bench.goals import at_most, settle
from bench.sampling import CHUNK, Letters
from lorry.actors.adapters.behind import SnapshotPolicy
from lorry.actors.adapters.residents import Residents
from lorry.actors.adapters.slots import AdapterPool
from lorry.actors.model.base_model import BaseModel, wrap_model
from lorry.actors.model.lora import LoraTargets, attach_lora
from lorry.actors.orders import Sample, Stop, Train
from lorry.actors.outbox import Outbox
from lorry.actors.progress import Progress
from lorry.actors.sampling.decoder import Decoder, Finished
from lorry.actors.sampling.lora.kernel import has_kernel
from lorry.actors.training.engine import Engine
from lorry.actors.training.trainer import Trainer
from lorry.actors.worker import Worker
from lorry.wire.actor_messages import AdapterState, Completion, FromActor, Item, MicroBatch
from lorry.wire.codec import encode
from lorry.wire.commands import ForwardBackwardInput, SampleInput
from lorry.wire.ids import BatchId, FutureId
from lorry.wire.model_input import ModelInput
from lorry.wire.types import LoraConfig, SamplingParams

RUNS, ROWS = 4, 16
ROUNDS_ALONE, FIRST = 2, 16


class TimedDecoder(Decoder):
    """`moments` are when its steps ended that all `sequences` were in."""

    moments: list[float]
    sequences: int

    def step(self, *, others_hold_memory: bool = False) -> list[Finished]:
        ended = super().step(others_hold_memory=others_hold_memory)
        if len(self.lineup.rows) == self.sequences:
            self.moments.append(time.perf_counter())
        return ended


Ends: TypeAlias = "queue.SimpleQueue[FutureId | None]"
"""None says that the worker's thread died."""


def next_end(ends: Ends) -> None:
    """Wait for one."""
    if ends.get() is None:
        raise RuntimeError("the worker's thread died; its traceback is above")


class Actor:
    """A worker in its thread. Commands of training are sent again as soon as they are answered, while `training`."""

    def __init__(self, base: BaseModel, targets: LoraTargets, share: float, row_tokens: int, sequences: int) -> None:
        engine = Engine(base, targets, AdapterPool(16, base.device))
        self.decoder = TimedDecoder(base, Letters(), 64, CHUNK, 2**30, native=has_kernel(base))
        self.decoder.moments, self.decoder.sequences = [], sequences
        residents = Residents(targets, engine.pool, 2**40, SnapshotPolicy(inf, inf), lambda _: None)
        outbox = Outbox()
        trainer = Trainer(engine, residents, targets, "bench")
        self.worker = Worker(
            engine,
            self.decoder,
            residents,
            trainer,
            share,
            self._post,
            lambda _: None,
            Progress(inf),
            Progress(inf),
            outbox,
        )
        self.training = False
        self.trained_tokens = 0
        self._ended: Ends = queue.SimpleQueue()
        self._trained: Ends = queue.SimpleQueue()
        self._paused: Ends = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        data = [datum(row) for row in torch.randint(0, VOCAB, (ROWS, row_tokens + 1))]
        self._payload, self._row_tokens = encode(ForwardBackwardInput(data, "cross_entropy", {})), row_tokens

    def run(self) -> None:
        try:
            self.worker.run()
        except BaseException:
            for ends in (self._ended, self._trained, self._paused):
                ends.put(None)
            raise

    def train(self) -> None:
        self.training = True
        for run in range(RUNS):
            self._send(FutureId(f"run-{run}:0"))

    def train_on(self, rounds: int) -> float:
        """Tokens per second of training over some rounds."""
        while not self._trained.empty():
            next_end(self._trained)
        next_end(self._trained)
        started, trained = time.perf_counter(), self.trained_tokens
        for _ in range(rounds * RUNS):
            next_end(self._trained)
        return (self.trained_tokens - trained) / (time.perf_counter() - started)

    def pause(self) -> None:
        """Returns when no training is under way."""
        self.training = False
        for _ in range(RUNS):
            next_end(self._paused)

    def sample(self, tokens: int) -> None:
        """Returns when all have ended."""
        params = SamplingParams(max_tokens=tokens, stop=[])
        for i in range(self.decoder.sequences):
            prompt = ModelInput.from_ints(torch.randint(0, VOCAB, (64,)).tolist())
            item = Item(FutureId(f"sample-{next(self._numbers)}"), "sample", None)
            self.worker.orders.put(Sample(BatchId(i), item, encode(SampleInput(prompt, 1, params))))
        for _ in range(self.decoder.sequences):
            next_end(self._ended)

    def _send(self, earlier: FutureId) -> None:
        run = earlier.partition(":")[0]
        item = Item(
            FutureId(f"{run}:{next(self._numbers)}"), "forward_backward", AdapterState(run, LoraConfig(rank=16))
        )
        batch = MicroBatch(BatchId(next(self._numbers)), "train", [item], ROWS * self._row_tokens)
        self.worker.orders.put(Train(batch, [self._payload]))

    def _post(self, message: FromActor, payloads: Sequence[bytes] = ()) -> None:
        assert isinstance(message, Completion)
        (outcome,) = message.outcomes
        assert outcome.error is None, outcome.error
        self.trained_tokens += outcome.train_tokens
        if not outcome.train_tokens:
            self._ended.put(outcome.future)
        elif self.training:
            self._send(outcome.future)
            self._trained.put(outcome.future)
        else:
            self._paused.put(outcome.future)


@contextmanager
def working(actor: Actor) -> Generator[None]:
    thread = Thread(target=actor.run)
    thread.start()
    try:
        yield
    finally:
        actor.worker.orders.put(Stop())
        thread.join()


@dataclass(frozen=True, slots=True)
class Stretch:
    """What happened while sequences decoded: gaps between tokens, tokens trained, seconds, sampling's part of them."""

    gaps: list[float]
    trained: int
    spent_s: float
    sampling: float

    @property
    def p95_s(self) -> float:
        return statistics.quantiles(self.gaps, n=20)[-1]


def stretch(actor: Actor, new: int) -> Stretch:
    """The first tokens are not counted: of a pass that began before there was anybody to wait for it."""
    worker = actor.worker
    actor.decoder.moments.clear()
    started, trained, train_s, sample_s = time.perf_counter(), actor.trained_tokens, worker.train_s, worker.sample_s
    actor.sample(FIRST + new)
    spent_s = time.perf_counter() - started
    train_s, sample_s = worker.train_s - train_s, worker.sample_s - sample_s
    gaps = [end - start for start, end in itertools.pairwise(actor.decoder.moments[FIRST:])]
    return Stretch(gaps, actor.trained_tokens - trained, spent_s, sample_s / (train_s + sample_s))


def measure(actor: Actor, share: float, new: int, repetitions: int) -> dict[str, Any]:
    """Medians over repetitions, in which sequences decode alone, then beside training, and training runs alone."""
    alone, beside, training = list[Stretch](), list[Stretch](), list[float]()
    with working(actor):
        for _ in range(repetitions):
            alone.append(stretch(actor, new))
            actor.train()
            beside.append(stretch(actor, new))
            training.append(actor.train_on(ROUNDS_ALONE))
            actor.pause()
    trained_per_s = sum(s.trained for s in beside) / sum(s.spent_s for s in beside)
    return {
        "share": share,
        "alone_p50_s": statistics.median(gap for s in alone for gap in s.gaps),
        "alone_p95_s": statistics.median(s.p95_s for s in alone),
        "beside_p50_s": statistics.median(gap for s in beside for gap in s.gaps),
        "beside_p95_s": statistics.median(s.p95_s for s in beside),
        "p95_ratio": ratios([s.p95_s for s in beside], [s.p95_s for s in alone]),
        "sampling": statistics.median(s.sampling for s in beside),
        "trained_tokens_per_s": trained_per_s,
        "trained_of_alone": trained_per_s / statistics.median(training),
    }


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--row-tokens", type=int, default=16, help="of each datum")
    parser.add_argument("--sequences", type=int, nargs="+", default=[8])
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args(arguments)
    base = wrap_model(build_model())
    targets = attach_lora(base)
    columns = ("sequences", "share", "alone: median, p95", "beside", "p95 over p95", "at most", "sampling", "training")
    title = f"beside {RUNS} runs of {ROWS} x {options.row_tokens} tokens, {torch.get_num_threads()} threads"
    table, found, missed = Table(*columns, title=title), list[dict[str, Any]](), list[str]()
    for sequences, share in itertools.product(options.sequences, options.shares):
        actor = Actor(base, targets, share, options.row_tokens, sequences)
        one = {"sequences": sequences} | measure(actor, share, options.new_tokens, options.repetitions)
        found.append(one)
        middle, low, high = one["p95_ratio"]
        missed += at_most(f"p95 over p95, {sequences} sequences with a share of {share}", middle, 1 / share)
        table.add_row(
            f"{sequences}",
            f"{share}",
            f"{one['alone_p50_s'] * 1e3:.0f}, {one['alone_p95_s'] * 1e3:.0f} ms",
            f"{one['beside_p50_s'] * 1e3:.0f}, {one['beside_p95_s'] * 1e3:.0f} ms",
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
            f"{1 / share:.2f}",
            f"{one['sampling']:.0%}",
            f"{one['trained_of_alone']:.0%}",
        )
    Console().print(table)
    print(json.dumps({"bench": "shares", "row_tokens": options.row_tokens, "results": found}))
    return missed


if __name__ == "__main__":
    settle(main())
