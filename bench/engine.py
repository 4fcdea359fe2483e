"""How much of the frozen base model's own speed is left when eight runs train on it at once.

Per micro-batch of one row per run, interleaved in one process: (a) Lorry's mixed forward_backward; (b) the same runs
one after the other through PEFT; (c) the frozen base alone, forward and backward, without LoRA. Prints a table and a
JSON line. The model has random weights: 41.6 M parameters, 25.2 M in 8 layers and 16.4 M in tied embeddings.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench.goals import at_least, at_most, settle
from lorry.actors.adapters.slots import AdapterPool
from lorry.actors.model.base_model import wrap_model
from lorry.actors.model.lora import attach_lora
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.training.compiled_layers import CompiledLayers
from lorry.actors.training.engine import Engine, ForwardBackwardJob
from lorry.wire.commands import ForwardBackwardInput
from lorry.wire.model_input import ModelInput
from lorry.wire.types import Datum, ForwardBackwardOutput, TensorData

RANKS = (8, 16, 32)
VOCAB = 32_000
GOALS = {32: (2.4, 1.35), 128: (1.4, 1.2)}
"""By tokens per row: over PEFT at least, of the frozen base's time at most."""
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def build_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


def datum(row: Tensor) -> Datum:
    """row [tokens + 1] int64: each token predicts the next."""
    return Datum(ModelInput.from_ints(row[:-1].tolist()), {"target_tokens": TensorData.from_torch(row[1:])})


class Lorry:
    """(a) One mixed micro-batch."""

    def __init__(self, model: PreTrainedModel, runs: int, *, compile_layers: bool = False) -> None:
        self.base = wrap_model(model)
        self.targets = attach_lora(self.base)
        self.pool = AdapterPool(runs, self.base.device)
        for i in range(runs):
            self.pool.add(str(i), self.targets.new_adapter(AdapterSpec(RANKS[i % 3], seed=i), self.base.device))
        self.engine = Engine(self.base, self.targets, self.pool)
        if compile_layers:
            self.base.in_flight.layers = CompiledLayers(self.base, self.targets)

    def prepare(self, rows: Tensor) -> Callable[[], object]:
        jobs = [
            ForwardBackwardJob(str(i), ForwardBackwardInput([datum(row)], "cross_entropy"))
            for i, row in enumerate(rows)
        ]

        def run() -> object:
            outcomes = self.engine.forward_backward(jobs)
            assert all(isinstance(outcome, ForwardBackwardOutput) for outcome in outcomes)
            return outcomes

        return run

    def clear(self) -> None:
        for key in self.pool.hot:
            self.pool.get(key).grad.zero_()
            self.pool.get(key).pending = False


class Peft:
    """(b) One run after the other, all adapters on one PeftModel."""

    def __init__(self, model: PreTrainedModel, runs: int) -> None:
        configs = [
            LoraConfig(r=RANKS[i % 3], lora_alpha=32, target_modules=PROJECTIONS, ensure_weight_tying=False)
            for i in range(runs)
        ]
        self.model: PeftModel = get_peft_model(model, configs[0], "0")  # pyright: ignore[reportAttributeAccessIssue]
        for i in range(1, runs):
            self.model.add_adapter(str(i), configs[i])

    def prepare(self, rows: Tensor) -> Callable[[], object]:
        def run() -> None:
            for i, row in enumerate(rows):
                self.model.set_adapter(str(i))
                backward(self.model, row)

        return run

    def clear(self) -> None:
        self.model.zero_grad()


def backward(model: PeftModel, row: Tensor) -> None:
    """row [tokens + 1] int64, by the loss of transformers itself: shift_labels are the targets, and with
    num_items_in_batch 1 it is a sum."""
    labels = row[None, 1:]
    options = {"labels": labels, "shift_labels": labels, "num_items_in_batch": 1, "use_cache": False}
    model(input_ids=row[None, :-1], **options).loss.backward()


class FrozenBase:
    """(c) The same tokens as one batch through the base model, with its gradient down to the embeddings."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prepare(self, rows: Tensor) -> Callable[[], object]:
        def run() -> None:
            embeddings = self.model.get_input_embeddings()(rows[:, :-1]).detach().requires_grad_()
            logits = self.model(inputs_embeds=embeddings, use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").backward()

        return run

    def clear(self) -> None:
        pass


class Way(Protocol):
    """One of those that take turns."""

    def prepare(self, rows: Tensor) -> Callable[[], object]:
        """rows [runs, tokens + 1] int64, one of each run."""
        ...

    def clear(self) -> None:
        """Gradients that a turn left."""
        ...


def measure(ways: Mapping[str, Way], rows: Tensor, repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of every repetition, the ways taking turns so that a disturbance meets all alike."""
    runs = {name: way.prepare(rows) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 2):
        for name, run in runs.items():
            ways[name].clear()
            started = time.perf_counter()
            run()
            if repetition >= 2:  # the first two warm caches and allocators up
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def ratios(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios of neighbouring repetitions."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return middle, low, high


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128], help="tokens per row")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="as an actor with --compile does it")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="peft")
    model = build_model()
    ways: dict[str, Way] = {
        "lorry": Lorry(copy.deepcopy(model), options.runs, compile_layers=options.compile),
        "peft": Peft(copy.deepcopy(model), options.runs),
        "base": FrozenBase(model),
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    how = "compiled, " if options.compile else ""
    threads = torch.get_num_threads()
    title = f"{parameters / 1e6:.1f} M parameters, {options.runs} runs of one row, {how}{threads} threads"
    table = Table("tokens per row", "lorry ms", "PEFT ms", "base ms", "PEFT / lorry", "lorry / base", title=title)
    results, missed = list[dict[str, object]](), list[str]()
    for length in options.lengths:
        rows = torch.randint(0, VOCAB, (options.runs, length + 1))
        times = measure(ways, rows, options.repetitions)
        medians = {name: statistics.median(values) for name, values in times.items()}
        speedup, cost = ratios(times["peft"], times["lorry"]), ratios(times["lorry"], times["base"])
        shown = [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in (speedup, cost)]
        table.add_row(str(length), *(f"{medians[name]:.1f}" for name in ways), *shown)
        results.append({"tokens": length, "ms": medians, "peft_over_lorry": speedup, "lorry_over_base": cost})
        if length in GOALS:
            missed += at_least(f"engine over PEFT at {length} tokens a row", speedup[0], GOALS[length][0])
            missed += at_most(f"engine over the frozen base at {length} tokens a row", cost[0], GOALS[length][1])
    Console().print(table)
    facts = {"bench": "engine", "compiled": options.compile, "parameters": parameters, "runs": options.runs}
    print(json.dumps(facts | {"results": results}))
    return missed


if __name__ == "__main__":
    settle(main())
