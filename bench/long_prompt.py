"""How long a prompt of 2,000 tokens holds 15 decoding sequences up, on the model of 41.6 M parameters.

A step decodes every sequence and computes a chunk of the prompt beside them: the longest step while the prompt is
computed is to be no longer than a plain decode step and one chunk alone. Prints a table and a JSON line.
"""

import argparse
import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from bench.engine import VOCAB, build_model
from bench.goals import at_most, settle
from bench.sampling import CHUNK, Letters
from lorry.actors.model.base_model import wrap_model
from lorry.actors.model.lora import attach_lora
from lorry.actors.sampling.decoder import Decoder
from lorry.actors.sampling.lora.kernel import has_kernel
from lorry.wire.commands import SampleInput
from lorry.wire.model_input import ModelInput
from lorry.wire.types import SamplingParams

LONG = 2000
GOAL = 1.15
"""A chunk, and what the times vary by."""


def request(tokens: int, new: int) -> SampleInput:
    prompt = torch.randint(0, VOCAB, (tokens,)).tolist()
    return SampleInput(ModelInput.from_ints(prompt), 1, SamplingParams(max_tokens=new, stop=[]))


def step_s(decoder: Decoder) -> float:
    started = time.perf_counter()
    decoder.step()
    return time.perf_counter() - started


def measure(decoder: Decoder, key: str) -> tuple[list[float], list[float], list[float]]:
    """Seconds of decode steps, of steps with a chunk beside them, and of the same chunks without any decoding."""
    for i in range(15):
        decoder.add(i, request(64, 200), None, i)
    while len(decoder.lineup.rows) < 15:
        decoder.step()
    plain = [step_s(decoder) for _ in range(20)]
    decoder.add(key, request(LONG, 1), None, 0)
    mixed = [step_s(decoder) for _ in range(-(-LONG // CHUNK))]
    for i in range(15):
        decoder.cancel(i)
    decoder.add(f"{key} alone", request(LONG, 1), None, 0)
    alone: list[float] = []
    while decoder.active:
        alone.append(step_s(decoder))
    return plain, mixed, alone


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args(arguments)
    base = wrap_model(build_model())
    attach_lora(base)
    decoder = Decoder(base, Letters(), max_rows=64, prefill_chunk=CHUNK, kv_cache_bytes=2**30, native=has_kernel(base))
    measure(decoder, "warm-up")
    found = [measure(decoder, str(i)) for i in range(options.repetitions)]
    plain = statistics.median(seconds for steps, _, _ in found for seconds in steps)
    longest = statistics.median(max(mixed) for _, mixed, _ in found)
    chunk = statistics.median(max(alone) for _, _, alone in found)
    ratio = statistics.median(max(mixed) / (max(alone) + statistics.median(steps)) for steps, mixed, alone in found)
    table = Table("decode step", "longest with a chunk", "longest chunk alone", "over step and chunk")
    table.add_row(*(f"{seconds * 1e3:.0f} ms" for seconds in (plain, longest, chunk)), f"{ratio:.2f}")
    console = Console()
    console.print(f"a prompt of {LONG} tokens, {CHUNK} a chunk, among 15 sequences, {torch.get_num_threads()} threads")
    console.print(table)
    print(json.dumps({"bench": "long_prompt", "chunk": CHUNK, "plain_s": plain, "mixed_s": longest, "chunk_s": chunk}))
    return at_most("the longest step over a decode step and a chunk", ratio, GOAL)


if __name__ == "__main__":
    settle(main())
