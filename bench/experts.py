"""What adapters on routed experts cost: training over the frozen mixture's own time and over PEFT run after run, and
sampling over `generate` with PEFT.

A random mixture of about 40 M parameters: 8 layers of 16 experts, of which a token chooses 2. Eight runs of ranks 8, 16
and 32 train one row of 128 tokens each on attention, experts and head; sixteen adapters sample 16 tokens each. The
frozen base's time is that of transformers' fastest way of computing experts. The sides take turns in one process.
Prints a table and a JSON line.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench import sampling
from bench.engine import RANKS, FrozenBase, Lorry, backward, measure, ratios
from bench.goals import at_least, at_most, settle

VOCAB, TOKENS, RUNS = 8_000, 128, 8
WAYS = ("grouped_mm", "eager")
"""Of transformers. batched_mm would copy an expert's weights for each pair."""
NEW = 16
MOST_OF_BASE, LEAST_OVER_PEFT = 1.35, 2.0
LEAST_OVER_GENERATE, MOST_OVER_ONE = 5.0, 1.5
_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def build_mixture() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=384,
        moe_intermediate_size=224,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_experts=16,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    return Qwen3MoeForCausalLM(config).eval().requires_grad_(False)


class Peft:
    """One run after the other. PEFT holds one adapter on weights that are no modules, so each run has a model."""

    def __init__(self, model: PreTrainedModel, runs: int) -> None:
        self.models = [self._adapted(copy.deepcopy(model), RANKS[i % 3]) for i in range(runs)]

    @staticmethod
    def _adapted(model: PreTrainedModel, rank: int) -> PeftModel:
        config = LoraConfig(
            r=rank,
            lora_alpha=32,
            target_modules=_MODULES,
            target_parameters=_PARAMETERS,
            ensure_weight_tying=False,
        )
        return get_peft_model(model, config)  # pyright: ignore[reportReturnType]

    def prepare(self, rows: Tensor) -> Callable[[], object]:
        def run() -> None:
            for model, row in zip(self.models, rows, strict=True):
                backward(model, row)

        return run

    def clear(self) -> None:
        for model in self.models:
            model.zero_grad()


class PeftGenerate:
    """Adapter after adapter, each with a model."""

    def __init__(self, model: PreTrainedModel, adapters: int) -> None:
        assert model.generation_config is not None
        model.generation_config.eos_token_id = None
        self.models = Peft(model, adapters).models

    def prepare(self, prompts: Tensor, adapters: int) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for model, own in zip(self.models[:adapters], prompts.chunk(adapters), strict=True):
                    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": 0}
                    model.generate(input_ids=own, attention_mask=torch.ones_like(own), use_cache=True, **options)

        return run


Ratio: TypeAlias = tuple[float, float, float]
"""Median, lower and upper quartile."""


@dataclass(frozen=True, slots=True)
class Training:
    """`base` is the fastest of transformers' ways, by the medians in `ms`."""

    ms: dict[str, float]
    base: str
    lorry_over_base: Ratio
    peft_over_lorry: Ratio


@dataclass(frozen=True, slots=True)
class Drawing:
    tokens_per_s: float
    peft_over_lorry: Ratio
    many_over_one: Ratio


def train(repetitions: int) -> tuple[Training, list[str]]:
    model = build_mixture()
    ways = {"lorry": Lorry(copy.deepcopy(model), RUNS), "peft": Peft(model, RUNS)}
    bases = {way: FrozenBase(copy.deepcopy(model)) for way in WAYS}
    for way, base in bases.items():
        base.model.set_experts_implementation(way)
    times = measure({**ways, **bases}, torch.randint(0, VOCAB, (RUNS, TOKENS + 1)), repetitions)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(WAYS, key=lambda way: medians[way])
    cost, speedup = ratios(times["lorry"], times[fastest]), ratios(times["peft"], times["lorry"])
    missed = at_most("training over the frozen mixture", cost[0], MOST_OF_BASE)
    missed += at_least("training on experts over PEFT", speedup[0], LEAST_OVER_PEFT)
    return Training(medians, fastest, cost, speedup), missed


def sample(repetitions: int) -> tuple[Drawing, list[str]]:
    model = build_mixture()
    lorry, peft = sampling.Lorry(copy.deepcopy(model), False), PeftGenerate(model, 16)
    prompts = torch.randint(0, VOCAB, (16, sampling.PROMPT))
    runs = {
        "many": lorry.prepare(prompts, 16, NEW),
        "one": lorry.prepare(prompts, 1, NEW),
        "peft": peft.prepare(prompts, 16),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repetition:
                times[name].append(time.perf_counter() - started)
    speedup, spread = ratios(times["peft"], times["many"]), ratios(times["many"], times["one"])
    missed = at_least("sampling from experts over generate", speedup[0], LEAST_OVER_GENERATE)
    missed += at_most("sixteen adapters on experts over one", spread[0], MOST_OVER_ONE)
    rate = 16 * NEW / statistics.median(times["many"])
    return Drawing(rate, speedup, spread), missed


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="peft")
    training, missed = train(options.repetitions)
    drawing, also_missed = sample(max(2, options.repetitions // 3))
    table = Table("of a mixture", "median (quartiles)", title=f"{torch.get_num_threads()} threads")
    named = {
        "training, over the frozen base": training.lorry_over_base,
        "training, PEFT run after run over it": training.peft_over_lorry,
        "sampling 16 adapters, generate with PEFT over it": drawing.peft_over_lorry,
        "sampling 16 adapters over one": drawing.many_over_one,
    }
    for name, (middle, low, high) in named.items():
        table.add_row(name, f"{middle:.2f} ({low:.2f} to {high:.2f})")
    Console().print(table)
    parameters = sum(parameter.numel() for parameter in build_mixture().parameters())
    found = {"training": asdict(training), "sampling": asdict(drawing)}
    print(json.dumps({"bench": "experts", "parameters": parameters} | found))
    return missed + also_missed


if __name__ == "__main__":
    settle(main())
