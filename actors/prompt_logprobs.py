"""The logprobs of a prompt's own tokens, from its hidden states, in chunks that bound the memory of the logits.

They are those of the model as it is, at temperature 1. It reads the output head alone.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..wire.errors import NonFiniteError
from .base_model import BaseModel
from .in_flight import Segment
from .sampling import top_logprobs
from .sequences import Request

if TYPE_CHECKING:
    from ..wire.types import TopkLogprobs

LOGITS_PER_CHUNK = 2**24
"""64 MiB of float32."""


def score_prompt(base: BaseModel, hidden: Tensor, start: int, request: Request) -> None:
    """Adds to the request's scores what it wants of `hidden` [tokens, hidden], whose first is position `start` of the
    prompt. Position i predicts token i + 1. A logprob that is not finite fails the request."""
    scores, prompt = request.scores, request.prompt
    if scores is None:
        return
    chunk = max(1, LOGITS_PER_CHUNK // base.vocab_size)
    end = min(start + len(hidden), len(prompt) - 1)
    for first in range(max(start, scores.next_position), end, chunk):
        last = min(first + chunk, end)
        base.in_flight.segments = [] if request.adapter is None else [Segment(request.adapter, 0, last - first)]
        logits = base.logits(hidden[first - start : last - start]).float()  # [chunk, vocab]
        logprobs = logits.log_softmax(-1)
        targets = torch.tensor(prompt[first + 1 : last + 1], device=hidden.device)
        found = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1).tolist()
        scores.logprobs += found
        if request.top_prompt:
            top = top_logprobs(logprobs)
            scores.top += list_top(top.indices, top.values, request.top_prompt)
        if not all(math.isfinite(logprob) for logprob in found):
            request.error = NonFiniteError("the prompt's logprobs are not finite", field="prompt")


def list_top(tokens: Tensor, logprobs: Tensor, top: int) -> "list[TopkLogprobs]":
    """tokens and logprobs [rows, at least top], likeliest first."""
    pairs = zip(tokens[:, :top].tolist(), logprobs[:, :top].tolist(), strict=True)
    return [list(zip(row, values, strict=True)) for row, values in pairs]
