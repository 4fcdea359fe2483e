"""How much of the frozen base model's own speed is left when many runs train on it at once.

Per micro-batch of one row per run, interleaved in one process: (a) Lorry's mixed forward_backward; (b) the same runs
one after the other through PEFT; (c) all of them as one batch through PEFT; (d) the frozen base alone, forward and
backward, without LoRA. Prints a table and a JSON line. The model has random weights: 41.6 M parameters, 25.2 M in 8
layers and 16.4 M in tied embeddings.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench.goals import at_least, at_most, settle
from bench.limits import limits_of
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


@dataclass(frozen=True, slots=True)
class Case:
    """One row of `tokens` of each run. Goals: over PEFT run after run at least, where it is measured, and of the frozen
    base's time at most."""

    runs: int
    tokens: int
    over_peft: float | None
    over_base: float


CASES = {
    "8 x 32": Case(8, 32, 3.0, 1.35),
    "8 x 128": Case(8, 128, 1.7, 1.2),
    "16 x 32": Case(16, 32, None, 1.15),
    "16 x 256": Case(16, 256, None, 1.0),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def build_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same for everybody, but for its dtype."""
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
    model: PreTrainedModel = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    return model.bfloat16() if dtype == torch.bfloat16 else model


def datum(row: Tensor) -> Datum:
    """row [tokens + 1] int64: each token predicts the next."""
    return Datum(ModelInput.from_ints(row[:-1].tolist()), {"target_tokens": TensorData.from_torch(row[1:])})


class Lorry:
    """(a) One mixed micro-batch."""

    def __init__(
        self, model: PreTrainedModel, runs: int, *, compile_layers: bool = False, ranks: Sequence[int] = RANKS
    ) -> None:
        self.base = wrap_model(model)
        self.targets = attach_lora(self.base)
        self.pool = AdapterPool(runs, self.base.device)
        for i in range(runs):
            spec = AdapterSpec(ranks[i % len(ranks)], seed=i)
            self.pool.add(str(i), self.targets.new_adapter(spec, self.base.device))
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
                backward(self.model, row[None])

        return run

    def clear(self) -> None:
        self.model.zero_grad()


class PeftMixed:
    """(c) All runs in one batch, each row through its adapter: PEFT's `adapter_names`, with a gradient for all."""

    def __init__(self, peft: Peft) -> None:
        self._peft = peft
        peft.model.eval()  # else PEFT mixes nothing; adapters have no dropout
        self._factors = [p for name, p in peft.model.named_parameters() if "lora_" in name]

    def prepare(self, rows: Tensor) -> Callable[[], object]:
        names = [str(i) for i in range(len(rows))]

        def run() -> None:
            for factor in self._factors:
                factor.requires_grad_(True)
            backward(self._peft.model, rows, adapter_names=names)

        return run

    def clear(self) -> None:
        self._peft.clear()


def backward(model: PeftModel, rows: Tensor, **options: object) -> None:
    """rows [rows, tokens + 1] int64, by the loss of transformers itself: shift_labels are the targets, and with
    num_items_in_batch 1 it is a sum."""
    labels = rows[:, 1:].contiguous()
    how = {"labels": labels, "shift_labels": labels, "num_items_in_batch": 1, "use_cache": False}
    model(input_ids=rows[:, :-1], **how, **options).loss.backward()


class FrozenBase:
    """(d) The same tokens as one batch through the base model, with its gradient down to the embeddings."""

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


def weights_of(model: PreTrainedModel) -> int:
    """Of all matrix products of a token. Forward and back to the inputs make 4 operations of each."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))


def shown(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="runs x tokens of a row")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="as an actor with --compile"
    )
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="peft")
    model, console = build_model(), Console(width=140)
    limits = limits_of(torch.device("cpu"), torch.float32)
    peft = Peft(copy.deepcopy(model), 8)
    lorry = Lorry(copy.deepcopy(model), 16, compile_layers=options.compile)
    ways: dict[str, Way] = {"lorry": lorry, "base": FrozenBase(model)}
    beside: dict[str, Way] = {"peft": peft, "mixed": PeftMixed(peft)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    how = "compiled, " if options.compile else ""
    title = f"{parameters / 1e6:.1f} M parameters, {how}{torch.get_num_threads()} threads, {limits} measured"
    columns = ("runs x tokens", "ms", "of the rate", "over base", "goal", "over PEFT", "goal", "over PEFT mixed")
    table, results, missed = Table(*columns, title=title), list[dict[str, object]](), list[str]()
    for name in options.cases:
        case: Case = CASES[name]
        rows = torch.randint(0, VOCAB, (case.runs, case.tokens + 1))
        times = measure(ways if case.over_peft is None else ways | beside, rows, options.repetitions)
        ms = {way: statistics.median(values) for way, values in times.items()}
        share = 4 * weights_of(model) * case.runs * case.tokens / ms["lorry"] * 1e3 / limits.operations_per_s
        cost = ratios(times["lorry"], times["base"])
        missed += at_most(f"the engine over the frozen base, {name}", cost[0], case.over_base)
        table_row = [name, f"{ms['lorry']:.1f}", f"{share:.0%}", shown(cost), str(case.over_base)]
        result: dict[str, object] = {"case": name, "ms": ms, "lorry_over_base": cost, "of_the_rate": share}
        if case.over_peft is not None:
            speedup, mixed = (ratios(times[way], times["lorry"]) for way in beside)
            missed += at_least(f"the engine over PEFT, {name}", speedup[0], case.over_peft)
            table_row += [shown(speedup), str(case.over_peft), shown(mixed)]
            result |= {"peft_over_lorry": speedup, "mixed_over_lorry": mixed}
        table.add_row(*table_row)
        results.append(result)
    console.print(table)
    console.print("of the rate: of the machine's products, what the frozen base's alone would take")
    facts = {"bench": "engine", "compiled": options.compile, "parameters": parameters}
    print(json.dumps(facts | {"results": results}))
    return missed


if __name__ == "__main__":
    settle(main())
