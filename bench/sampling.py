"""How fast many adapters sample together, over `generate` of transformers called adapter after adapter with PEFT.

64-token prompts, 64 new tokens, float32, on the demo's model and on one of 41.6 M random parameters; ranks 8, 16 and 32
on every linear layer and the output head. Both sides sample at temperature 1 and stop for nothing; `generate` gets all
prompts of an adapter at once. The sides take turns in one process. Prints a table and a JSON line.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.engine import RANKS, Peft, build_model, ratios
from bench.goals import at_least, at_most, settle
from lorry.actors.model.adapter import Adapter
from lorry.actors.model.base_model import BaseModel, wrap_model
from lorry.actors.model.lora import LoraTargets, attach_lora, layers_of
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.model.survey import survey
from lorry.actors.sampling.compiled import CompiledModel
from lorry.actors.sampling.decode_linears import BaseProducts
from lorry.actors.sampling.decoder import Decoder
from lorry.actors.sampling.lora.kernel import has_kernel
from lorry.wire.commands import SampleInput
from lorry.wire.model_input import ModelInput
from lorry.wire.types import SampleResponse, SamplingParams

DEMO_MODEL = Path(__file__).parent.parent / "tests" / "assets" / "base-model"
PROMPT = 64
NEW = 64
CHUNK = 512
"""An actor's own default."""
SHAPES = ((4, 4), (16, 1), (1, 16))
"""Adapters, and sequences of each."""
GOALS = {(4, 4): 3.5, (16, 1): 7.0, (1, 16): 1.5}
MANY_OVER_ONE = 1.15
OVER_PRODUCTS = 1.3
"""Of a step of 16 sequences over 4 adapters, on the larger model."""


def choose(adapters: int) -> list[int]:
    """Which of the sixteen: one alone has the middle rank, so that what many cost over it is not what ranks cost."""
    return [RANKS.index(sorted(RANKS)[1])] if adapters == 1 else list(range(adapters))


class Letters:
    """No sequence here has a stop string, so that nothing is ever decoded."""

    def decode(self, token_ids: list[int], **_: bool) -> str:
        raise AssertionError("nothing is to be decoded")


class Lorry:
    """`step_s` are the seconds of every step. Few compute prompts."""

    def __init__(self, model: PreTrainedModel, compile_steps: bool) -> None:
        self.base: BaseModel = wrap_model(model)
        self.targets: LoraTargets = attach_lora(self.base)
        self.adapters: list[Adapter] = [self._adapter(i) for i in range(16)]
        compiled = CompiledModel(self.base) if compile_steps else None
        self.decoder = Decoder(self.base, Letters(), 64, CHUNK, 2**30, compiled, native=has_kernel(self.base))
        self.step_s: list[float] = []

    def prepare(self, prompts: Tensor, adapters: int, new: int = NEW) -> Callable[[], None]:
        params = SamplingParams(max_tokens=new, stop=[], seed=0)
        requests = [SampleInput(ModelInput.from_ints(row), 1, params) for row in prompts.tolist()]
        chosen = choose(adapters)

        def run() -> None:
            for i, request in enumerate(requests):
                self.decoder.add(i, request, self.adapters[chosen[i % adapters]], i)
            ended = 0
            while self.decoder.active:
                started = time.perf_counter()
                for _, result, _ in self.decoder.step():
                    assert isinstance(result, SampleResponse) and len(result.sequences[0].tokens) == new
                    ended += 1
                self.step_s.append(time.perf_counter() - started)
            assert ended == len(requests)

        return run

    def _adapter(self, i: int) -> Adapter:
        adapter = self.targets.new_adapter(AdapterSpec(RANKS[i % 3], seed=i), self.base.device, trainable=False)
        adapter.weights.normal_(0, 0.01, generator=torch.Generator().manual_seed(i))
        adapter.refresh()
        return adapter


class PeftGenerate:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model: PeftModel = Peft(model, 16).model
        assert model.generation_config is not None
        model.generation_config.eos_token_id = None

    def prepare(self, prompts: Tensor, adapters: int) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for i, adapter in enumerate(choose(adapters)):
                    self.model.set_adapter(str(adapter))
                    own = prompts[i::adapters]
                    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
                    found = self.model.generate(
                        input_ids=own, attention_mask=torch.ones_like(own), use_cache=True, pad_token_id=0, **options
                    )
                    assert found.shape[1] == PROMPT + NEW

        return run


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens per second of one shape, and ratios as (median, lower, upper quartile)."""

    adapters: int
    sequences: int
    lorry_tokens_per_s: float
    peft_tokens_per_s: float
    speedup: tuple[float, float, float]
    base_share: float


def matrix_products(base: BaseModel, rows: int) -> Callable[[], None]:
    """What the base model alone multiplies in one decode step."""
    layers = layers_of(base)
    groups = [[layers[index] for index in group] for group in survey(base).groups]
    products = BaseProducts(groups)
    inputs = [torch.randn(rows, group[0].in_features) for group in groups]

    def run() -> None:
        with torch.inference_mode():
            for g, x in enumerate(inputs):
                products.products(g, x)

    return run


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(
    model: PreTrainedModel, repetitions: int, compile_steps: bool
) -> tuple[list[Shape], tuple[float, float, float]]:
    """Every shape, and what 16 adapters of one sequence cost over one adapter of 16."""
    lorry, peft = Lorry(copy.deepcopy(model), compile_steps), PeftGenerate(copy.deepcopy(model))
    prompts = torch.randint(1, model.config.get_text_config().vocab_size, (16, PROMPT))
    ours = {shape: lorry.prepare(prompts, shape[0]) for shape in SHAPES}
    theirs = {shape: peft.prepare(prompts, shape[0]) for shape in SHAPES}
    products = matrix_products(lorry.base, 16)
    times: dict[str, dict[tuple[int, int], list[float]]] = {
        name: {shape: [] for shape in SHAPES} for name in ("ours", "theirs", "share")
    }
    for repetition in range(repetitions + 1):
        for shape in SHAPES:
            lorry.step_s.clear()
            spent = timed(ours[shape]), timed(theirs[shape])
            share = statistics.median(timed(products) for _ in range(10)) / statistics.median(lorry.step_s)
            if repetition:  # the first one warms caches and allocators up
                for name, value in zip(times, (*spent, share), strict=True):
                    times[name][shape].append(value)
    shapes = [
        Shape(
            *shape,
            16 * NEW / statistics.median(times["ours"][shape]),
            16 * NEW / statistics.median(times["theirs"][shape]),
            ratios(times["theirs"][shape], times["ours"][shape]),
            statistics.median(times["share"][shape]),
        )
        for shape in SHAPES
    ]
    return shapes, ratios(times["ours"][16, 1], times["ours"][1, 16])


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=("demo", "large"), default=["demo", "large"])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, help="of torch, for both sides [default: 1 for demo, else torch's choice]"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="as an actor with --compile"
    )
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="peft")
    usual_threads = torch.get_num_threads()
    results, missed = list[dict[str, object]](), list[str]()
    for name in options.models:
        torch.set_num_threads(options.threads or (1 if name == "demo" else usual_threads))
        model = build_model() if name == "large" else AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
        shapes, cost = measure(model.eval().requires_grad_(False), options.repetitions, options.compile)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        title = f"{parameters / 1e6:.1f} M parameters, {PROMPT} + {NEW} tokens, {torch.get_num_threads()} threads"
        title += ", compiled" if options.compile else ""
        table = Table(
            "adapters x sequences", "lorry tokens/s", "PEFT tokens/s", "over PEFT", "goal", "base", title=title
        )
        for shape in shapes:
            middle, low, high = shape.speedup
            table.add_row(
                f"{shape.adapters} x {shape.sequences}",
                f"{shape.lorry_tokens_per_s:.0f}",
                f"{shape.peft_tokens_per_s:.0f}",
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{GOALS[shape.adapters, shape.sequences]}",
                f"{shape.base_share:.0%}",
            )
            results.append({"model": name, "adapters": shape.adapters, "speedup": shape.speedup})
            what = f"sampling {shape.adapters} x {shape.sequences} over PEFT, {name} model"
            missed += at_least(what, middle, GOALS[shape.adapters, shape.sequences])
            if name == "large" and shape.adapters == 4:
                missed += at_most("a decode step over the base's own products", 1 / shape.base_share, OVER_PRODUCTS)
        console = Console()
        console.print(table)
        console.print("base: the base model's own matrix products, of a decode step's time")
        console.print(
            f"16 x 1 over 1 x 16: {cost[0]:.2f} ({cost[1]:.2f} to {cost[2]:.2f}) times the time; goal {MANY_OVER_ONE}"
        )
        results.append({"model": name, "many_over_one": cost})
        missed += at_most(f"sampling 16 x 1 over 1 x 16, {name} model", cost[0], MANY_OVER_ONE)
    torch.set_num_threads(usual_threads)
    print(json.dumps({"bench": "sampling", "compiled": options.compile, "results": results}))
    return missed


if __name__ == "__main__":
    settle(main())
