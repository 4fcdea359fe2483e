"""The logprobs of a prompt's own tokens, from its hidden states, in chunks that bound the memory of the logits.

They are those of the model as it is, at temperature 1. It reads the output head alone.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ...wire.errors import NonFiniteError
from ..model.in_flight import Segment
from .sequences import PromptScores, Request
from .tokens import draw, seed_of_sample, top_logprobs

if TYPE_CHECKING:
    from ...wire.types import TopkLogprobs

LOGITS_PER_CHUNK = 2**24
"""64 MiB of float32."""
ALTERNATIVES = 2**32
"""What keeps the draws of a prompt's alternatives apart from the samples, which count from 0."""


Head: TypeAlias = Callable[[Tensor, list[Segment]], Tensor]
"""hidden [rows, hidden], and whose rows they are -> logits [rows, vocab]."""


def score_prompt(head: Head, vocab_size: int, hidden: Tensor, start: int, request: Request) -> None:
    """Adds to the request's scores what it wants of `hidden` [tokens, hidden], whose first is position `start` of the
    prompt. Position i predicts token i + 1. A logprob that is not finite fails the request."""
    scores, prompt = request.scores, request.prompt
    if scores is None:
        return
    chunk = max(1, LOGITS_PER_CHUNK // vocab_size)
    end = min(start + len(hidden), len(prompt) - 1)
    for first in range(max(start, scores.next_position), end, chunk):
        last = min(first + chunk, end)
        segments = [] if request.adapter is None else [Segment(request.adapter, 0, last - first)]
        logits = head(hidden[first - start : last - start], segments).float()  # [chunk, vocab]
        logprobs = logits.log_softmax(-1)
        targets = torch.tensor(prompt[first + 1 : last + 1], device=hidden.device).clamp_(min=0)
        found = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1).tolist()
        top: list[TopkLogprobs] = []
        of_targets: list[list[float]] = []
        drawn: list[list[int]] = []
        drawn_logprobs: list[list[float]] = []
        if request.top_prompt:
            likeliest = top_logprobs(logprobs)
            top = list_top(likeliest.indices, likeliest.values, request.top_prompt)
        if scores.targets is not None:
            of_targets = _of_targets(logprobs, scores, first, last)
        if scores.alternatives:
            positions = torch.arange(first + 1, last + 1, device=hidden.device)
            ids = _draw(logprobs, request, scores.alternatives, positions)  # [chunk, k]
            drawn, drawn_logprobs = ids.tolist(), logprobs.gather(-1, ids).tolist()
        # All of it or, where memory ran out above, nothing.
        scores.logprobs += found
        scores.top += top
        scores.target_logprobs += of_targets
        scores.drawn += drawn
        scores.drawn_logprobs += drawn_logprobs
        if not all(math.isfinite(logprob) for logprob in found):
            request.error = NonFiniteError("the prompt's logprobs are not finite", field="prompt")


def _of_targets(logprobs: Tensor, scores: PromptScores, first: int, last: int) -> list[list[float]]:
    """logprobs [chunk, vocab] of what follows positions `first` to `last`; a cell of -1 gets some number."""
    assert scores.targets is not None
    ids = torch.from_numpy(scores.targets[first:last]).to(logprobs.device)  # [chunk, K]
    return logprobs.gather(-1, ids.clamp(min=0)).tolist()


def _draw(logprobs: Tensor, request: Request, k: int, positions: Tensor) -> Tensor:
    """k independent tokens for each row of logprobs [chunk, vocab] at the request's temperature -> [chunk, k]."""
    seeds = [seed_of_sample(request.seed, ALTERNATIVES + i) for i in range(k)]
    return torch.stack([draw(logprobs, request.params.temperature, seed, positions) for seed in seeds], -1)


def list_top(tokens: Tensor, logprobs: Tensor, top: int) -> "list[TopkLogprobs]":
    """tokens and logprobs [rows, at least top], likeliest first."""
    pairs = zip(tokens[:, :top].tolist(), logprobs[:, :top].tolist(), strict=True)
    return [list(zip(row, values, strict=True)) for row, values in pairs]
