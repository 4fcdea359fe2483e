"""Decoding on the model of `bench.engine`: how it grows with the sequences that decode together."""

import statistics
from collections.abc import Iterator, Sequence

import torch

from bench.curves.curve import Point
from bench.engine import VOCAB, build_model
from bench.sampling import NEW, PROMPT, Lorry, matrix_products, timed

ADAPTERS = 8


def sequences(at: Sequence[int]) -> Iterator[Point]:
    """Of up to eight adapters in turn, 64 tokens behind a prompt of 64."""
    lorry = Lorry(build_model(), compile_steps=False)
    for count in at:
        run = lorry.prepare(torch.randint(1, VOCAB, (count, PROMPT)), min(count, ADAPTERS))
        products = matrix_products(lorry.base, count)
        run()
        lorry.step_s.clear()
        spent = [timed(run) for _ in range(3)]
        step_s = statistics.median(lorry.step_s)
        found = {
            "tokens/s": count * NEW / statistics.median(spent),
            "ms a step": 1e3 * step_s,
            "% the base's products": 100 * statistics.median(timed(products) for _ in range(10)) / step_s,
        }
        yield Point(count, found)
