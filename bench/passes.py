"""How much of a training pass is not matrix products, as the model's own layers compute it and compiled.

In turns, in one process: one mixed forward_backward, the same with compiled layers, and the matrix products that it is
made of alone: the base's and LoRA's, forward and back, of the same shapes, without attention's. Two models of random
weights: the 41.6 M parameters of `bench.engine` with 16 runs of 256 tokens, and 5.2 M with 4 of 128. Prints a table and
a JSON line.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench.engine import Lorry, Way, build_model, measure, ratios
from bench.goals import at_most, settle
from lorry.actors.model.lora import layers_of


@dataclass(frozen=True, slots=True)
class Case:
    build: Callable[[], PreTrainedModel]
    runs: int
    tokens: int
    goal: float
    """Of the compiled pass over its products, at most."""


def build_small() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


aten, onednn = torch.ops.aten, torch.ops.mkldnn
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, onednn._linear_pointwise}
CASES = {"large": Case(build_model, 16, 256, 1.25), "small": Case(build_small, 4, 128, 1.6)}


class Products:
    """Those of one pass, noted while it runs, with what they multiplied."""

    def __init__(self, lorry: Lorry) -> None:
        self._lorry = lorry

    def prepare(self, rows: Tensor) -> Callable[[], object]:
        run = self._lorry.prepare(rows)
        with _Notes() as notes:
            run()
        layers = len(layers_of(self._lorry.base))
        assert len(notes.products) >= 2 * layers, "each layer has one forward and one back"

        @torch.no_grad()
        def multiply() -> None:
            for function, args, options in notes.products:
                function(*args, **options)

        return multiply

    def clear(self) -> None:
        pass


class _Notes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.products.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def compare(case: Case, repetitions: int) -> tuple[dict[str, float], dict[str, tuple[float, float, float]]]:
    """Median milliseconds of each way, and both passes over their products."""
    model = case.build()
    plain, compiled = (Lorry(copy.deepcopy(model), case.runs, compile_layers=how) for how in (False, True))
    ways: dict[str, Way] = {"plain": plain, "compiled": compiled, "products": Products(Lorry(model, case.runs))}
    rows = torch.randint(0, model.config.get_text_config().vocab_size, (case.runs, case.tokens + 1))
    times = measure(ways, rows, repetitions)
    over = {name: ratios(times[name], times["products"]) for name in ("plain", "compiled")}
    return {name: statistics.median(values) for name, values in times.items()}, over


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args(arguments)
    title = f"training passes over their own matrix products, {torch.get_num_threads()} threads"
    table = Table("model", "rows", "products ms", "as it is", "compiled", "goal", title=title)
    results, missed = list[dict[str, object]](), list[str]()
    for name in options.cases:
        case: Case = CASES[name]
        ms, over = compare(case, options.repetitions)
        shown = [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in over.values()]
        table.add_row(name, f"{case.runs} x {case.tokens}", f"{ms['products']:.0f}", *shown, str(case.goal))
        results.append({"model": name, "ms": ms, "over_products": over})
        missed += at_most(f"a compiled pass of the {name} model over its products", over["compiled"][0], case.goal)
    Console().print(table)
    print(json.dumps({"bench": "passes", "results": results}))
    return missed


if __name__ == "__main__":
    settle(main())
