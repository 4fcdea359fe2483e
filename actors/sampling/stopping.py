"""When a sequence ends: stop tokens, and stop strings wherever they fall among the tokens.

Pure: it sees the sampled tokens of one sequence and a tokenizer's decode, nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ...wire.types import SamplingParams

CONTEXT_TOKENS = 4
"""Decoded ahead of the tokens that can hold a stop string: the first token of a text may decode without its space."""


class Detokenizer(Protocol):
    """What `AutoTokenizer` returns has it."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class StopRule:
    """`window` is how many of the last tokens can hold any of the strings."""

    tokens: frozenset[int]
    strings: tuple[str, ...]
    window: int

    @classmethod
    def of(cls, params: SamplingParams, end_tokens: Sequence[int]) -> "StopRule":
        if params.stop is None:
            return cls(frozenset(end_tokens), (), 0)
        stop = [params.stop] if isinstance(params.stop, str) else params.stop
        strings = tuple(entry for entry in stop if isinstance(entry, str))
        # No token that shows in the text is shorter than a byte.
        window = max((len(entry.encode()) for entry in strings), default=0) + CONTEXT_TOKENS
        return cls(frozenset(entry for entry in stop if isinstance(entry, int)), strings, window)

    def ends(self, tokens: list[int], detokenizer: Detokenizer) -> bool:
        """Whether the last of the sampled `tokens` ends the sequence, given that none before it did."""
        if tokens[-1] in self.tokens:
            return True
        if not self.strings:
            return False
        text = detokenizer.decode(tokens[-self.window :], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)
