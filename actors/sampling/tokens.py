"""From logits to tokens: tempering, top-k, top-p and one reproducible random number for each token.

Pure: tensors in, tensors out. It knows no model, no cache and no text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...wire.types import SamplingParams

MAX_TOP_LOGPROBS = 20
HEAD = 1024
"""How many of a row's likeliest tokens are sorted first: a nucleus is rarely larger, and a full sort is dear."""
OFF = 2**62
"""A top-k that no vocabulary reaches."""

# The finalizer's multipliers and the step, as int64: torch has no uint64 arithmetic, and products wrap alike.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def split_mix(seeds: Tensor, counters: Tensor) -> Tensor:
    """Output number `counters` of SplitMix64 started at `seeds`; both int64, so is the result: 64 random bits.

    Counter-based: no state is carried from one to the next. Source: Steele, Lea, Flood, 'Fast splittable pseudorandom
    number generators' (OOPSLA 2014), with the constants of Vigna's reference code, prng.di.unimi.it/splitmix64.c.
    """
    z = seeds + (counters + 1) * _STEP
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Float64 in [0, 1), 53 bits each, from seeds and positions [rows] int64."""
    return _shift_right(split_mix(seeds, positions), 11).double() * 2.0**-53


def seed_of_sample(seed: int, sample: int) -> int:
    """The seed of one of a request's samples, far from those of its siblings and of neighbouring seeds."""
    return int(split_mix(torch.tensor(seed), torch.tensor(sample)))


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical: `>>` on int64 copies the sign bit."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The parameters of the rows of a batch, [rows] each unless noted; made once and used while the rows stay."""

    temperature: Tensor  # float32; 1 where greedy
    greedy: Tensor  # bool
    seeds: Tensor  # int64
    cut: Tensor  # [cut] int64: the rows that top-k or top-p cuts
    top_k: Tensor  # [cut] int64; OFF or more than the vocabulary where it cuts nothing
    top_p: Tensor  # [cut] float32
    head: int  # how many of a cut row's likeliest tokens to sort first
    top: Tensor  # [top] int64: the rows that want the likeliest tokens' logprobs
    any_greedy: bool
    all_greedy: bool
    all_temperature_1: bool

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        wants_top: Sequence[bool],
        device: torch.device | str,
    ) -> "SamplingRows":
        greedy = [p.temperature == 0 for p in params]
        cut = [i for i, p in enumerate(params) if not greedy[i] and (p.top_k > 0 or p.top_p < 1)]
        top_k = [params[i].top_k if params[i].top_k > 0 else OFF for i in cut]
        temperature = [p.temperature or 1.0 for p in params]
        return cls(
            temperature=torch.tensor(temperature, dtype=torch.float32, device=device),
            greedy=torch.tensor(greedy, dtype=torch.bool, device=device),
            seeds=torch.tensor(seeds, dtype=torch.int64, device=device),
            cut=torch.tensor(cut, dtype=torch.int64, device=device),
            top_k=torch.tensor(top_k, dtype=torch.int64, device=device),
            top_p=torch.tensor([params[i].top_p for i in cut], dtype=torch.float32, device=device),
            head=max((HEAD if k == OFF else k for k in top_k), default=0),
            top=torch.tensor([i for i, want in enumerate(wants_top) if want], dtype=torch.int64, device=device),
            any_greedy=any(greedy),
            all_greedy=all(greedy),
            all_temperature_1=all(t == 1 for t in temperature),
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """`logprobs` [rows] is not finite where a row's logits are not; `top_*` [top, at most 20], likeliest first."""

    tokens: Tensor  # [rows] int64
    logprobs: Tensor  # [rows] float32
    top_tokens: Tensor  # int64
    top_logprobs: Tensor  # float32


def sample(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Sampled:
    """logits [rows, vocab], positions [rows] int64: the place of the new token in its sequence.

    A row's token depends on its own logits, parameters, seed and position alone. Logprobs are of the tempered
    distribution before the cuts; a greedy row's are those at temperature 1.
    """
    logprobs = tempered_logprobs(logits, rows)  # [rows, vocab]
    if rows.all_greedy:
        tokens = logprobs.argmax(-1)
    else:
        probabilities = logprobs.exp()
        if len(rows.cut):
            cut = keep_likeliest(probabilities[rows.cut], rows.top_k, rows.top_p, rows.head)
            probabilities[rows.cut] = cut
        tokens = inverse_cdf(probabilities, uniforms(rows.seeds, positions))
        if rows.any_greedy:
            tokens = torch.where(rows.greedy, logprobs.argmax(-1), tokens)
    chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    top = top_logprobs(logprobs[rows.top])
    return Sampled(tokens, chosen, top.indices, top.values)


def draw(logprobs: Tensor, temperature: float, seed: int, positions: Tensor) -> Tensor:
    """A token for each row of logprobs [rows, vocab], tempered and not cut -> [rows] int64. positions [rows] int64."""
    if temperature == 0:
        return logprobs.argmax(-1)
    return inverse_cdf((logprobs / temperature).softmax(-1), uniforms(torch.full_like(positions, seed), positions))


def tempered_logprobs(logits: Tensor, rows: SamplingRows) -> Tensor:
    logits = logits.float()
    if not rows.all_temperature_1:
        logits = logits / rows.temperature.unsqueeze(-1)
    return logits.log_softmax(-1)


def top_logprobs(logprobs: Tensor) -> "torch.return_types.topk":
    """The 20 likeliest of each row of [rows, vocab], whatever fewer were asked for: ties then fall alike for all."""
    return logprobs.topk(min(MAX_TOP_LOGPROBS, logprobs.shape[-1]))


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """probabilities [rows, vocab] of any sum above 0, uniform [rows] in [0, 1) -> tokens [rows] int64.

    No token of probability 0 is ever drawn.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    target = (uniform.unsqueeze(-1) * total).to(total.dtype)
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))  # rounding must not reach past the end
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return tokens.clamp_(max=probabilities.shape[-1] - 1)  # only NaN rows get there


def keep_likeliest(probabilities: Tensor, top_k: Tensor, top_p: Tensor, head: int) -> Tensor:
    """Zeroes all but the `top_k` likeliest, and of those all but the fewest that hold `top_p` of their mass.

    probabilities [rows, vocab] of sum 1, top_k [rows] int64, top_p [rows]. `head` is how many to sort at
    first, at least any top_k below vocab; it changes the cost alone. Among equals the lower ids stay.
    """
    vocab = probabilities.shape[-1]
    count, threshold, complete = _nucleus(probabilities.topk(min(head, vocab)).values, top_k, top_p, vocab)
    if not bool(complete.all()):
        rest = (~complete).nonzero().squeeze(-1)
        likeliest = probabilities[rest].sort(-1, descending=True).values
        count[rest], threshold[rest], _ = _nucleus(likeliest, top_k[rest], top_p[rest], vocab)
    above = probabilities > threshold  # [rows, vocab]
    equal = probabilities == threshold
    kept = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    return probabilities * kept


def _nucleus(likeliest: Tensor, top_k: Tensor, top_p: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """How many tokens each row keeps [rows, 1], the least probability among them [rows, 1], and whether the head of
    sorted probabilities, `likeliest` [rows, head], was enough to tell [rows]."""
    ranks = torch.arange(likeliest.shape[-1], device=likeliest.device)
    in_top_k = ranks < top_k.unsqueeze(-1)
    likeliest = likeliest * in_top_k
    cumulative = likeliest.cumsum(-1)
    off = top_k >= vocab
    mass = torch.where(off, torch.ones_like(top_p), cumulative[:, -1]) * top_p  # [rows]
    count = (in_top_k & (cumulative - likeliest < mass.unsqueeze(-1))).sum(-1, keepdim=True).clamp_(min=1)
    complete = ~off | (cumulative[:, -1] >= mass) | (likeliest.shape[-1] == vocab)
    return count, likeliest.gather(-1, count - 1), complete
