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
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import torch
from rich.console import Console
from rich.table import Table

from bench.engine import VOCAB, build_model, datum
from bench.sampling import CHUNK, Letters
from lorry.actors.base_model import BaseModel, wrap_model
from lorry.actors.decoder import Decoder, Finished
from lorry.actors.engine import Engine
from lorry.actors.lora import LoraTargets, attach_lora
from lorry.actors.orders import Sample, Stop, Train
from lorry.actors.residents import Residents
from lorry.actors.slots import AdapterPool
from lorry.actors.training import Trainer
from lorry.actors.worker import Worker
from lorry.wire.actor_messages import AdapterState, Completion, Item, MicroBatch
from lorry.wire.codec import encode
from lorry.wire.commands import ForwardBackwardInput, SampleInput
from lorry.wire.ids import BatchId, FutureId
from lorry.wire.types import LoraConfig, ModelInput, SamplingParams

RUNS, ROWS = 4, 16


class TimedDecoder(Decoder):
    """`moments` are when its steps ended that all `sequences` were in."""

    moments: list[float]
    sequences: int

    def step(self) -> list[Finished]:
        ended = super().step()
        if len(self.lineup.rows) == self.sequences:
            self.moments.append(time.perf_counter())
        return ended


class Actor:
    """A worker in its thread. Commands of training are sent again as soon as they are answered, while `training`."""

    def __init__(self, base: BaseModel, targets: LoraTargets, share: float, row_tokens: int, sequences: int) -> None:
        engine = Engine(base, targets, AdapterPool(16, base.device))
        self.decoder = TimedDecoder(base, Letters(), 64, CHUNK, 2**30)
        self.decoder.moments, self.decoder.sequences = [], sequences
        residents = Residents(targets, engine.pool, 8)
        trainer = Trainer(engine, residents, targets, "bench")
        self.worker = Worker(engine, self.decoder, residents, trainer, share, self._post)
        self.training = False
        self.trained_tokens = 0
        self._ended: queue.SimpleQueue[FutureId] = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        data = [datum(row) for row in torch.randint(0, VOCAB, (ROWS, row_tokens + 1))]
        self._payload, self._row_tokens = encode(ForwardBackwardInput(data, "cross_entropy", {})), row_tokens

    def train(self) -> None:
        self.training = True
        for run in range(RUNS):
            self._send(FutureId(f"run-{run}:0"))

    def sample(self, tokens: int) -> None:
        """Returns when all have ended."""
        params = SamplingParams(max_tokens=tokens, stop=[])
        for i in range(self.decoder.sequences):
            prompt = ModelInput.from_ints(torch.randint(0, VOCAB, (64,)).tolist())
            item = Item(FutureId(f"sample-{next(self._numbers)}"), "sample", None)
            self.worker.orders.put(Sample(BatchId(i), item, encode(SampleInput(prompt, 1, params))))
        for _ in range(self.decoder.sequences):
            self._ended.get()

    def _send(self, earlier: FutureId) -> None:
        run = earlier.partition(":")[0]
        item = Item(
            FutureId(f"{run}:{next(self._numbers)}"), "forward_backward", AdapterState(run, LoraConfig(rank=16))
        )
        batch = MicroBatch(BatchId(next(self._numbers)), "train", [item], ROWS * self._row_tokens)
        self.worker.orders.put(Train(batch, [self._payload]))

    def _post(self, completion: Completion, payloads: list[bytes]) -> None:
        (outcome,) = completion.outcomes
        assert outcome.error is None, outcome.error
        self.trained_tokens += outcome.train_tokens
        if not outcome.train_tokens:
            self._ended.put(outcome.future)
        elif self.training:
            self._send(outcome.future)


@contextmanager
def working(actor: Actor) -> Iterator[None]:
    thread = Thread(target=actor.worker.run)
    thread.start()
    try:
        yield
    finally:
        actor.training = False
        actor.worker.orders.put(Stop())
        thread.join()


def measure(actor: Actor, share: float, new: int) -> dict[str, float]:

    def sampled() -> tuple[list[float], float, float]:
        """Gaps between tokens, tokens trained per second meanwhile, and sampling's part of the device's time."""
        worker = actor.worker
        actor.decoder.moments.clear()
        before = time.perf_counter(), actor.trained_tokens, worker.train_s, worker.sample_s
        actor.sample(new)
        spent_s = time.perf_counter() - before[0]
        train_s, sample_s = worker.train_s - before[2], worker.sample_s - before[3]
        gaps = [end - start for start, end in itertools.pairwise(actor.decoder.moments)]
        return gaps, (actor.trained_tokens - before[1]) / spent_s, sample_s / (train_s + sample_s)

    with working(actor):
        actor.sample(16)  # warms up
        alone, _, _ = sampled()
        actor.train()
        actor.sample(16)
        beside, trained, split = sampled()
    return {
        "share": share,
        "alone_p50_s": statistics.median(alone),
        "alone_p95_s": _p95(alone),
        "beside_p50_s": statistics.median(beside),
        "beside_p95_s": _p95(beside),
        "p95_ratio": _p95(beside) / _p95(alone),
        "median_ratio": statistics.median(beside) / statistics.median(alone),
        "sampling": split,
        "trained_tokens_per_s": trained,
    }


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--row-tokens", type=int, default=16, help="of each datum: a pass holds one at least")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=200)
    options = parser.parse_args(arguments)
    base = wrap_model(build_model())
    targets = attach_lora(base)
    found = [
        measure(Actor(base, targets, share, options.row_tokens, options.sequences), share, options.new_tokens)
        for share in options.shares
    ]
    title = f"{options.sequences} sequences beside {RUNS} runs of {ROWS} x {options.row_tokens} tokens"
    columns = (
        "share",
        "alone: median, p95",
        "beside training",
        "p95 over p95",
        "at most",
        "sampling",
        "trained tokens/s",
    )
    table = Table(*columns, title=f"{title}, {torch.get_num_threads()} threads")
    for one in found:
        table.add_row(
            f"{one['share']}",
            f"{one['alone_p50_s'] * 1e3:.0f}, {one['alone_p95_s'] * 1e3:.0f} ms",
            f"{one['beside_p50_s'] * 1e3:.0f}, {one['beside_p95_s'] * 1e3:.0f} ms",
            f"{one['p95_ratio']:.2f}",
            f"{1 / one['share']:.2f}",
            f"{one['sampling']:.0%}",
            f"{one['trained_tokens_per_s']:.0f}",
        )
    Console().print(table)
    print(json.dumps({"bench": "shares", "row_tokens": options.row_tokens, "results": found}))


if __name__ == "__main__":
    main()
