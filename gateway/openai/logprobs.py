"""Logprobs as chat and as completions have them. Pure."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ...wire.types import TopkLogprobs
from ..chat.detokenizing import Detokenizer
from ..chat.vocabulary import Vocabulary

_LEAST = -9999.0
"""JSON has no infinity."""


def of_chat(
    vocabulary: Vocabulary, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopkLogprobs] | None
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        top = [_entry(vocabulary, other, at) for other, at in (tops[i] if tops else ())]
        found.append(_entry(vocabulary, token, logprob) | {"top_logprobs": top})
    return found


def _entry(vocabulary: Vocabulary, token: int, logprob: float) -> dict[str, Any]:
    name = vocabulary.name_of(token)
    return {"token": name, "logprob": _finite(logprob), "bytes": list(vocabulary.bytes_of(token))}


def of_completion(
    vocabulary: Vocabulary,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[TopkLogprobs | None] | None,
    begins_at: int = 0,
) -> dict[str, Any]:
    """`begins_at` is how many characters are before. What was sampled is among its place's `tops`, too."""
    return {
        "tokens": [vocabulary.name_of(token) for token in tokens],
        "token_logprobs": [None if logprob is None else _finite(logprob) for logprob in logprobs],
        "top_logprobs": None
        if tops is None
        else [_by_name(vocabulary, *each) for each in zip(tokens, logprobs, tops, strict=True)],
        "text_offset": offsets(vocabulary, tokens, begins_at),
    }


def _by_name(
    vocabulary: Vocabulary, token: int, logprob: float | None, top: TopkLogprobs | None
) -> dict[str, float] | None:
    if logprob is None:
        return None
    found: dict[str, float] = {}
    for other, at in [*(top or ()), (token, logprob)]:
        name = vocabulary.name_of(other)
        found[name] = max(found.get(name, -math.inf), _finite(at))
    return found


def offsets(vocabulary: Vocabulary, tokens: Iterable[int], begins_at: int) -> list[int]:
    """Where in the text each token begins to show."""
    detokenizer, at, found = Detokenizer(vocabulary), begins_at, list[int]()
    for token in tokens:
        found.append(at)
        at += len(detokenizer.flush() if token in vocabulary.special else detokenizer.feed(token))
    return found


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST) if not math.isnan(logprob) else _LEAST
