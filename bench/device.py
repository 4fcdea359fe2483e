"""How much of a device's own limits training and sampling reach, with a model of random weights that is made here.

(a) A training pass of many runs mixed: the operations of the frozen base's matrix products, forward and for the inputs'
    gradient (4 for each weight and token; LoRA's own and attention's are not counted), over the time, as a share of the
    rate of one large product in the same dtype.
(b) A decode step: the bytes of the base's weights and of the keys and values that it reads, over the time, as a share
    of the rate at which memory is copied.

Prints a table and a JSON line. `--size 4b` has the shapes of a Qwen3 of that size; `tiny` is for a look at a CPU.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench.engine import RANKS, datum, weights_of
from bench.limits import limits_of, seconds, wait
from bench.sampling import Letters
from lorry.actors.adapters.slots import AdapterPool
from lorry.actors.model.base_model import BaseModel, wrap_model
from lorry.actors.model.lora import LoraTargets, attach_lora
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.model.survey import survey
from lorry.actors.sampling.compiled import CompiledModel
from lorry.actors.sampling.decoder import Decoder
from lorry.actors.training.engine import Engine, ForwardBackwardJob
from lorry.wire.commands import ForwardBackwardInput, SampleInput
from lorry.wire.model_input import ModelInput
from lorry.wire.types import ForwardBackwardOutput, SamplingParams

SIZES = {
    "4b": Qwen3Config(
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "tiny": Qwen3Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    ),
}


def make_model(size: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen3ForCausalLM(SIZES[size]).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def train(base: BaseModel, targets: LoraTargets, runs: int, rows: int, tokens: int, repetitions: int) -> float:
    """Seconds of a pass of `rows` rows of `tokens` for each run."""
    pool = AdapterPool(runs, base.device)
    for i in range(runs):
        pool.add(str(i), targets.new_adapter(AdapterSpec(RANKS[i % 3], seed=i), base.device))
    engine = Engine(base, targets, pool, token_budget=runs * rows * tokens)
    texts = torch.randint(1, base.vocab_size, (runs, rows, tokens + 1))
    jobs = [
        ForwardBackwardJob(str(i), ForwardBackwardInput([datum(row) for row in text], "cross_entropy"))
        for i, text in enumerate(texts)
    ]

    def run() -> None:
        assert all(isinstance(outcome, ForwardBackwardOutput) for outcome in engine.forward_backward(jobs))

    return seconds(run, base.device, repetitions)


def decode(
    base: BaseModel, targets: LoraTargets, adapters: int, rows: int, prompt: int, *, compiles: bool
) -> tuple[float, float]:
    """Seconds of a step of `rows` sequences, the median, and how many tokens each had by then."""
    samplers = [
        targets.new_adapter(AdapterSpec(RANKS[i % 3], seed=i), base.device, trainable=False) for i in range(adapters)
    ]
    new = 48
    memory = (rows + 1) * (prompt + new + 32) * survey(base).token_bytes
    decoder = Decoder(base, Letters(), rows, 512, memory, CompiledModel(base) if compiles else None)
    params = SamplingParams(max_tokens=new, stop=[], seed=0)
    for i, text in enumerate(torch.randint(1, base.vocab_size, (rows, prompt)).tolist()):
        decoder.add(i, SampleInput(ModelInput.from_ints(text), 1, params), samplers[i % adapters], i)
    times: list[float] = []
    while decoder.active:
        started = time.perf_counter()
        decoder.step()
        wait(base.device)
        times.append(time.perf_counter() - started)
    alone = times[-new // 2 :]  # by then all prompts are computed, and none of them has ended
    return statistics.median(alone[:-2]), prompt + 0.75 * new


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--size", choices=SIZES, default="4b")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="in a row; two rows for each run")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="decode as an actor with --compile")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    limits = limits_of(device, dtype, options.repetitions)
    model = make_model(options.size, device, dtype)
    base = wrap_model(model)
    weights, weight_bytes = weights_of(model), weights_of(model) * dtype.itemsize
    targets = attach_lora(base)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    title = f"{name}, {options.dtype}: {limits} measured; {weights / 1e6:,.1f} M weights"
    table = Table("what", "tokens a second", "of the device's rate", title=title)
    found: list[dict[str, float | str]] = []
    for tokens in options.tokens:
        took = train(base, targets, options.runs, 2, tokens, options.repetitions)
        count = options.runs * 2 * tokens
        share = 4 * weights * count / took / limits.operations_per_s
        what = f"training, {options.runs} runs of two rows of {tokens:,}"
        table.add_row(what, f"{count / took:,.0f}", f"{share:.1%} of its operations")
        found.append({"what": what, "tokens_per_s": count / took, "share": share})
    for rows in options.sequences:
        adapters = min(rows, options.runs)
        took, length = decode(base, targets, adapters, rows, options.prompt, compiles=options.compile)
        read = weight_bytes + rows * length * survey(base).token_bytes
        share = read / took / limits.bytes_per_s
        what = f"decoding, {rows} sequences of {adapters} runs, {length:.0f} tokens behind each"
        table.add_row(what, f"{rows / took:,.0f}", f"{share:.1%} of its bandwidth")
        found.append({"what": what, "tokens_per_s": rows / took, "share": share})
    Console(width=140).print(table)
    print(json.dumps({"bench": "device", "name": name, "dtype": options.dtype, **asdict(limits), "found": found}))


if __name__ == "__main__":
    main()
