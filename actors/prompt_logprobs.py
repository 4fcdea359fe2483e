"""The logprobs of a prompt's own tokens, from its hidden states, in chunks that bound the memory of the logits.

It reads the output head alone and keeps nothing.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base_model import BaseModel
from .in_flight import Segment
from .sampling import top_logprobs
from .sequences import PromptLogprobs

if TYPE_CHECKING:
    from ..wire.types import TopkLogprobs
    from .adapters import Adapter

LOGITS_PER_CHUNK = 2**24
"""64 MiB of float32."""


def score_prompt(
    base: BaseModel, hidden: Tensor, prompt: list[int], adapter: "Adapter | None", top: int
) -> PromptLogprobs:
    """hidden [prompt, hidden]: position i predicts token i + 1. At temperature 1, with the `top` likeliest of each."""
    chunk = max(1, LOGITS_PER_CHUNK // base.vocab_size)
    targets = torch.tensor(prompt[1:], device=hidden.device)
    logprobs: list[float | None] = [None]
    likeliest: list[TopkLogprobs | None] = [None]
    for start in range(0, len(targets), chunk):
        chosen = targets[start : start + chunk]  # [chunk]
        base.in_flight.segments = [] if adapter is None else [Segment(adapter, 0, len(chosen))]
        logits = base.logits(hidden[start : start + len(chosen)]).float()  # [chunk, vocab]
        all_logprobs = logits.log_softmax(-1)
        logprobs += all_logprobs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).tolist()
        if top:
            found = top_logprobs(all_logprobs)
            likeliest += list_top(found.indices, found.values, top)
    return PromptLogprobs(logprobs, likeliest if top else None)


def list_top(tokens: Tensor, logprobs: Tensor, top: int) -> "list[TopkLogprobs]":
    """tokens and logprobs [rows, at least top], likeliest first."""
    pairs = zip(tokens[:, :top].tolist(), logprobs[:, :top].tolist(), strict=True)
    return [list(zip(row, values, strict=True)) for row, values in pairs]
