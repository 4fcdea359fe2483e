"""Tokens drawn from logits, and what is told of them, read back from the device once. It knows no requests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...wire.types import TopkLogprobs
from .prompt_logprobs import list_top
from .tokens import MAX_TOP_LOGPROBS, SamplingRows, sample


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token for each row; `top` has the likeliest ones of the rows that want them, by place."""

    on_device: Tensor  # [rows] int64
    tokens: list[int]
    logprobs: list[float]
    top: dict[int, TopkLogprobs]


def draw_tokens(logits: Tensor, sampling: SamplingRows, positions: Tensor) -> Drawn:
    """logits [rows, vocab], positions [rows] int64: those of the tokens to be drawn."""
    sampled = sample(logits, sampling, positions)
    top: dict[int, TopkLogprobs] = {}
    if len(sampling.top):
        found = list_top(sampled.top_tokens, sampled.top_logprobs, MAX_TOP_LOGPROBS)
        top = dict(zip(sampling.top.tolist(), found, strict=True))
    # One read from the device, in a type that holds tokens and logprobs exactly.
    tokens, logprobs = torch.stack((sampled.tokens.double(), sampled.logprobs.double())).tolist()
    return Drawn(sampled.tokens, [int(token) for token in tokens], logprobs, top)
