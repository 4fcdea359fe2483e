"""Mixed passes over the model of `bench.engine`: how they grow with tenants, ranks, and the length of rows."""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.curves.curve import Point
from bench.engine import RANKS, VOCAB, FrozenBase, Lorry, build_model, measure, ratios, weights_of
from bench.limits import limits_of

REPETITIONS = 5


def tenants(at: Sequence[int]) -> Iterator[Point]:
    """Each with one row of 32 tokens and an adapter of its own."""
    return _passes(at, lambda count: (count, 32, RANKS))


def ranks(at: Sequence[int]) -> Iterator[Point]:
    """Eight tenants of one rank with one row of 128 tokens each."""
    return _passes(at, lambda rank: (8, 128, (rank,)))


def rows(at: Sequence[int]) -> Iterator[Point]:
    """Four tenants with one row each."""
    return _passes(at, lambda tokens: (4, tokens, RANKS))


def _passes(at: Sequence[int], shape: Callable[[int], tuple[int, int, Sequence[int]]]) -> Iterator[Point]:
    """`shape`: tenants, tokens of the row of each, ranks in turn."""
    model = build_model()
    base, limits = FrozenBase(model), limits_of(torch.device("cpu"), torch.float32)
    for point in at:
        runs, tokens, ranks_ = shape(point)
        lorry = Lorry(copy.deepcopy(model), runs, ranks=ranks_)
        inputs = torch.randint(0, VOCAB, (runs, tokens + 1))
        times = measure({"lorry": lorry, "base": base}, inputs, REPETITIONS)
        ms = statistics.median(times["lorry"])
        operations = 4 * weights_of(model) * runs * tokens
        found = {
            "ms a pass": ms,
            "tokens/s": 1e3 * runs * tokens / ms,
            "over the frozen base": ratios(times["lorry"], times["base"]),
            "% of the machine's products": 1e5 * operations / ms / limits.operations_per_s,
        }
        yield Point(point, found)
