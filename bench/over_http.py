"""What is left of the engine and the decoder when the official SDK asks for their work over HTTP.

In one run, in turns, on a model of 5.2 M random parameters, the actor and what it is compared with on one thread each:

(a) training steps, `forward_backward` of 4 rows of 128 tokens and `optim_step` at rank 8, of one tenant and of eight,
    each in a loop of its own, in tokens a second over the engine's, which steps all of them together;
(b) 16 sequences of 64 tokens over 4 adapters, in tokens a second over the decoder's;
(c) one `forward_backward` of 8 tokens at a time, in milliseconds over the engine's.

The SDK runs in this process, and shares the machine with gateway, broker and actor. Prints a table and a JSON line.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
import torch
from anyio import to_thread
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bench.end_to_end import BASE_TOKENIZER
from bench.engine import datum, ratios, shown
from bench.goals import at_least, at_most, settle
from bench.passes import build_small
from bench.sampling import CHUNK, Letters, timed
from lorry.actors.adapters.slots import AdapterPool
from lorry.actors.config import ActorSettings
from lorry.actors.model.base_model import wrap_model
from lorry.actors.model.lora import attach_lora
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.sampling.decoder import Decoder
from lorry.actors.sampling.lora.kernel import has_kernel
from lorry.actors.training.engine import Engine, ForwardBackwardJob
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import serving
from lorry.wire.commands import ForwardBackwardInput, SampleInput
from lorry.wire.model_input import ModelInput
from lorry.wire.types import AdamParams, ForwardBackwardOutput, SampleResponse, SamplingParams

VOCAB, RANK, ROWS, TOKENS = 4096, 8, 4, 128
ADAPTERS, SAMPLES, PROMPT, NEW = 4, 4, 64, 64
MODEL = "bench"


@dataclass(frozen=True, slots=True)
class Way:
    """Two that take turns, `goal` of the first over the second: in rates at least, in times at most."""

    name: str
    over_http: Callable[[], None]
    alone: Callable[[], None]
    turns: int
    goal: float
    is_rate: bool


@dataclass(frozen=True, slots=True)
class Found:
    """Medians, and that of the ratio with its quartiles."""

    name: str
    over_http_ms: float
    alone_ms: float
    ratio: tuple[float, float, float]
    goal: float
    is_rate: bool


def measure(way: Way) -> Found:
    http, alone = list[float](), list[float]()
    for turn in range(way.turns + 2):
        spent = timed(way.over_http), timed(way.alone)
        if turn > 1:  # the first two warm up
            http.append(spent[0])
            alone.append(spent[1])
    ratio = ratios(alone, http) if way.is_rate else ratios(http, alone)
    return Found(way.name, 1e3 * statistics.median(http), 1e3 * statistics.median(alone), ratio, way.goal, way.is_rate)


class Alone:
    """The engine and the decoder, without anything around them."""

    def __init__(self) -> None:
        self._base = wrap_model(build_small())
        targets = attach_lora(self._base)
        pool = AdapterPool(8, self._base.device)
        for i in range(8):
            pool.add(str(i), targets.new_adapter(AdapterSpec(RANK, seed=i), self._base.device))
        self._engine = Engine(self._base, targets, pool)
        self._decoder = Decoder(self._base, Letters(), 64, CHUNK, 2**28, native=has_kernel(self._base))
        spec = AdapterSpec(RANK)
        self._adapters = [targets.new_adapter(spec, self._base.device, trainable=False) for _ in range(ADAPTERS)]

    def train(self, rows: Tensor, *, steps: int, optimise: bool = True) -> Callable[[], None]:
        """rows [runs, rows, tokens + 1] int64."""
        jobs = [
            ForwardBackwardJob(str(i), ForwardBackwardInput([datum(row) for row in own], "cross_entropy"))
            for i, own in enumerate(rows)
        ]

        def run() -> None:
            for _ in range(steps):
                outcomes = self._engine.forward_backward(jobs)
                assert all(isinstance(outcome, ForwardBackwardOutput) for outcome in outcomes)
                if optimise:
                    self._engine.optim_step([(job.adapter, AdamParams()) for job in jobs])

        return run

    def sample(self, prompts: Tensor) -> Callable[[], None]:
        """prompts [adapters, prompt] int64."""
        params = SamplingParams(max_tokens=NEW, stop=[], seed=0)
        requests = [SampleInput(ModelInput.from_ints(row), SAMPLES, params) for row in prompts.tolist()]

        def run() -> None:
            for i, request in enumerate(requests):
                self._decoder.add(i, request, self._adapters[i], i)
            while self._decoder.active:
                for _, result, _ in self._decoder.step():
                    assert isinstance(result, SampleResponse)

        return run


class OverHttp:
    """As scripts of the SDK: a session for each tenant, who waits for a step before the next."""

    def __init__(self, keys: Sequence[str], threads: ThreadPoolExecutor) -> None:
        import tinker  # slow to import, and only this needs it

        self._tinker, self._threads = tinker, threads
        self._runs = [
            tinker.ServiceClient(api_key=key).create_lora_training_client(base_model=MODEL, rank=RANK, seed=i).result()
            for i, key in enumerate(keys)
        ]
        self._samplers = [run.save_weights_and_get_sampling_client().result() for run in self._runs]

    def train(self, rows: Tensor, *, steps: int, optimise: bool = True) -> Callable[[], None]:
        data = [[self._datum(row) for row in own] for own in rows]

        def loop(i: int) -> None:
            for _ in range(steps):
                ended = self._runs[i].forward_backward(data[i], "cross_entropy")
                if optimise:
                    stepped = self._runs[i].optim_step(self._tinker.AdamParams())
                    ended.result()
                    stepped.result()
                else:
                    ended.result()

        return lambda: self._all(loop, len(data))

    def sample(self, prompts: Tensor) -> Callable[[], None]:
        params = self._tinker.SamplingParams(max_tokens=NEW, stop=[], seed=0)
        inputs = [self._tinker.ModelInput.from_ints(row) for row in prompts.tolist()]

        def run() -> None:
            futures = [
                sampler.sample(prompt, SAMPLES, params) for sampler, prompt in zip(self._samplers, inputs, strict=False)
            ]
            assert len(futures) == ADAPTERS
            for future in futures:
                assert all(len(sequence.tokens) == NEW for sequence in future.result().sequences)

        return run

    def _all(self, loop: Callable[[int], None], count: int) -> None:
        if count == 1:
            loop(0)
        else:
            list(self._threads.map(loop, range(count)))

    def _datum(self, row: Tensor) -> Any:
        types = self._tinker.types
        targets = types.TensorData(data=row[1:].tolist(), dtype="int64")
        return types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1].tolist()), loss_fn_inputs={"target_tokens": targets}
        )


def ways(over_http: OverHttp, alone: Alone, turns: int) -> list[Way]:
    def rows(runs: int, count: int, tokens: int) -> Tensor:
        return torch.randint(1, VOCAB, (runs, count, tokens + 1))

    one, eight, short = rows(1, ROWS, TOKENS), rows(8, ROWS, TOKENS), rows(1, 1, 8)
    prompts = torch.randint(1, VOCAB, (ADAPTERS, PROMPT))
    return [
        Way("steps of one tenant", over_http.train(one, steps=5), alone.train(one, steps=5), turns, 0.9, True),
        Way("steps of eight tenants", over_http.train(eight, steps=3), alone.train(eight, steps=3), turns, 0.97, True),
        Way("16 x 64 samples over 4 adapters", over_http.sample(prompts), alone.sample(prompts), turns, 0.85, True),
        Way(
            "one forward_backward of 8 tokens",
            over_http.train(short, steps=1, optimise=False),
            alone.train(short, steps=1, optimise=False),
            10 * turns,
            1.4,
            False,
        ),
    ]


async def served(folder: Path, data: Path, turns: int) -> list[Found]:
    config = ServeConfig(
        (ModelConfig(MODEL, str(folder)),),
        data,
        bind="tcp://127.0.0.1:*",
        http="127.0.0.1:0",
        actor=ActorSettings(threads=1),
        log_level="error",
    )
    async with serving(config) as deployment:
        keys = [await deployment.create_key(f"tenant-{i}") for i in range(8)]
        os.environ["TINKER_BASE_URL"] = deployment.url or ""
        return await to_thread.run_sync(take_turns, turns, keys)


def take_turns(turns: int, keys: Sequence[str]) -> list[Found]:
    torch.set_num_threads(1)
    with ThreadPoolExecutor(8) as threads:
        return [measure(way) for way in ways(OverHttp(keys, threads), Alone(), turns)]


def missed_by(found: Sequence[Found]) -> list[str]:
    missed = list[str]()
    for each in found:
        judge, of = (at_least, "rate") if each.is_rate else (at_most, "time")
        missed += judge(f"{each.name} over HTTP, of the {of} alone", each.ratio[0], each.goal)
    return missed


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    options = parser.parse_args(arguments)
    usual_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        build_small().save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(BASE_TOKENIZER).save_pretrained(folder)
        found = anyio.run(served, folder, Path(temporary) / "data", options.turns)
    torch.set_num_threads(usual_threads)
    table = Table("what", "over HTTP ms", "alone ms", "ratio", "goal", title="5.2 M parameters, one thread each")
    for each in found:
        of = "of its rate" if each.is_rate else "times as long"
        bound = "at least" if each.is_rate else "at most"
        table.add_row(
            each.name,
            f"{each.over_http_ms:.1f}",
            f"{each.alone_ms:.1f}",
            f"{shown(each.ratio)} {of}",
            f"{each.goal} {bound}",
        )
    Console().print(table)
    print(json.dumps({"bench": "over_http", "results": [asdict(each) for each in found]}))
    return missed_by(found)


if __name__ == "__main__":
    settle(main())
