"""What a sampling request wants and what its sequences have so far: the bookkeeping of the decode loop.

It knows no model and no tensor.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..wire.errors import LorryError, NonFiniteError
from ..wire.types import ModelInput, SampledSequence, SampleResponse, SamplingParams, StopReason, TopkLogprobs
from .stopping import Detokenizer, StopRule

if TYPE_CHECKING:
    from ..wire.commands import SampleInput
    from .adapters import Adapter


@dataclass(frozen=True, slots=True)
class Usage:
    """A prompt counts once, however many samples were drawn from it."""

    prefill_tokens: int
    sample_tokens: int


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of every token of a prompt, the first one's None; `top` likewise, where it was asked for."""

    logprobs: list[float | None]
    top: list[TopkLogprobs | None] | None

    def last(self, n: int) -> "PromptLogprobs":
        """None for all but the last `n` tokens."""
        blank = len(self.logprobs) - n
        top = None if self.top is None else [*[None] * blank, *self.top[blank:]]
        return PromptLogprobs([*[None] * blank, *self.logprobs[blank:]], top)


@dataclass(slots=True, eq=False)
class Request:
    """`waiting` samples have no row yet. `error` is set as soon as one of its sequences cannot go on."""

    key: Hashable
    prompt: list[int]
    adapter: "Adapter | None"
    params: SamplingParams
    stop: StopRule
    seed: int
    max_new_tokens: int
    waiting: int
    top_sample: int = 0
    top_prompt: int = 0
    wants_prompt: bool = False
    last_prompt: int | None = None
    prompt_logprobs: PromptLogprobs | None = None
    sequences: list[SampledSequence | None] = field(default_factory=list[SampledSequence | None])
    sample_tokens: int = 0
    error: LorryError | None = None

    @classmethod
    def to_sample(
        cls,
        key: Hashable,
        request: "SampleInput",
        adapter: "Adapter | None",
        default_seed: int,
        end_tokens: Sequence[int],
        max_context: int,
    ) -> "Request":
        params, prompt = request.sampling_params, request.prompt.to_ints()
        room = max_context - len(prompt)
        return cls(
            key,
            prompt,
            adapter,
            params,
            StopRule.of(params, end_tokens),
            seed=default_seed if params.seed is None else params.seed,
            max_new_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            waiting=request.num_samples,
            top_sample=request.topk_sample_logprobs,
            top_prompt=request.topk_prompt_logprobs,
            wants_prompt=request.include_prompt_logprobs or request.topk_prompt_logprobs > 0,
            last_prompt=request.prompt_logprobs_last_n,
            sequences=[None] * request.num_samples,
        )

    @classmethod
    def to_score(cls, key: Hashable, prompt: ModelInput, adapter: "Adapter | None") -> "Request":
        """Only the prompt's logprobs are wanted."""
        params = SamplingParams()
        rule = StopRule.of(params, ())
        return cls(key, prompt.to_ints(), adapter, params, rule, 0, max_new_tokens=0, waiting=0, wants_prompt=True)

    @property
    def complete(self) -> bool:
        prompt_is_known = self.prompt_logprobs is not None or not self.wants_prompt
        return self.error is not None or (prompt_is_known and None not in self.sequences)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt), self.sample_tokens)

    @property
    def result(self) -> SampleResponse | LorryError:
        if self.error is not None:
            return self.error
        prompt = self.prompt_logprobs
        if prompt is not None and self.last_prompt is not None:
            prompt = prompt.last(self.last_prompt)
        return SampleResponse(
            [sequence for sequence in self.sequences if sequence is not None],
            None if prompt is None else prompt.logprobs,
            None if prompt is None else prompt.top,
        )


@dataclass(slots=True, eq=False)
class Row:
    """One sequence that is being decoded: sample number `sample` of its request."""

    request: Request
    sample: int
    seed: int
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    top: list[TopkLogprobs] = field(default_factory=list[TopkLogprobs])

    @property
    def length(self) -> int:
        """Tokens so far, with the prompt: also the position of the next one."""
        return len(self.request.prompt) + len(self.tokens)

    def accept(self, token: int, logprob: float, top: TopkLogprobs | None, detokenizer: Detokenizer) -> bool:
        """Appends a token and says whether it was the last. A logprob that is not finite fails its request."""
        request = self.request
        if not math.isfinite(logprob):
            where = f"sample {self.sample} after {self.length} tokens"
            request.error = NonFiniteError(f"the model's logits are not finite for {where}", field="prompt")
            return True
        self.tokens.append(token)
        self.logprobs.append(logprob)
        request.sample_tokens += 1
        if top is not None:
            self.top.append(top[: request.top_sample])
        if request.stop.ends(self.tokens, detokenizer):
            return self._end("stop")
        if len(self.tokens) >= request.max_new_tokens:
            return self._end("length")
        return False

    def _end(self, reason: StopReason) -> bool:
        top = self.top if self.request.top_sample else None
        self.request.sequences[self.sample] = SampledSequence(reason, self.tokens, self.logprobs, top)
        return True
