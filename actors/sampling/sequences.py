"""What a sampling request wants and what its sequences have so far: the bookkeeping of the decode loop.

It runs no model and reads no tensor.
"""

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from ...wire.commands import most_new_tokens
from ...wire.errors import LorryError, NonFiniteError
from ...wire.streaming import Piece, Told
from ...wire.types import (
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    StopReason,
    TensorData,
    TopkLogprobs,
)
from ..images.layout import Images
from ..images.looking import Read
from .block_pool import PrefixKey
from .stopping import Detokenizer, StopRule

T = TypeVar("T")

if TYPE_CHECKING:
    from torch import Tensor

    from ...wire.commands import SampleInput
    from ..model.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Usage:
    """A prompt counts once, however many samples were drawn from it. `cached_tokens` of the `prefill_tokens` were
    found computed."""

    prefill_tokens: int
    sample_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True)
class PromptScores:
    """Of the prompt's tokens from `start` on, as far as they are known, each predicted by those before it.

    `targets` are other tokens whose logprobs are wanted in their places, -1 for none; `alternatives` is how many to
    draw.
    `shown_from` is the first whose own logprob is told, None where none is.
    """

    start: int
    shown_from: int | None
    targets: npt.NDArray[np.int64] | None = None  # [prompt - 1, K]
    sparse_targets: bool = False
    alternatives: int = 0
    logprobs: list[float] = field(default_factory=list[float])
    top: list[TopkLogprobs] = field(default_factory=list[TopkLogprobs])
    target_logprobs: list[list[float]] = field(default_factory=list[list[float]])
    drawn: list[list[int]] = field(default_factory=list[list[int]])
    drawn_logprobs: list[list[float]] = field(default_factory=list[list[float]])

    @classmethod
    def wanted_by(cls, request: "SampleInput") -> "PromptScores | None":
        length, last = request.prompt.length, request.prompt_logprobs_last_n
        targets, alternatives = request.target_prompt_logprobs, request.prompt_alt_tokens_k
        shown_from = None
        if request.include_prompt_logprobs or request.topk_prompt_logprobs > 0:
            shown_from = 1 if last is None else length - last
        if targets is None and not alternatives:
            return None if shown_from is None else cls(shown_from, shown_from)
        ids = None if targets is None else targets.to_numpy().astype(np.int64, copy=False)
        return cls(1, shown_from, ids, request.sparse_targets, alternatives)

    def show(self, values: Sequence[T]) -> list[T | None] | None:
        """One for each token of the prompt, from one for each of those from `start` on."""
        if self.shown_from is None:
            return None
        return [*[None] * self.shown_from, *values[self.shown_from - self.start :]]

    @property
    def target_table(self) -> TensorData | None:
        if self.targets is None:
            return None
        found = np.asarray(self.target_logprobs, dtype=np.float32).reshape(self.targets.shape)
        return TensorData(np.where(self.targets < 0, np.float32(np.nan), found))

    @property
    def alternative_tables(self) -> PromptAltTokens | None:
        if not self.alternatives:
            return None
        shape = (len(self.logprobs), self.alternatives)
        tokens = np.asarray(self.drawn, dtype=np.int64).reshape(shape)
        return PromptAltTokens(
            TensorData(tokens), TensorData(np.asarray(self.drawn_logprobs, dtype=np.float32).reshape(shape))
        )

    @property
    def next_position(self) -> int:
        """The position whose hidden state is wanted next: it predicts the token after it."""
        return self.start - 1 + len(self.logprobs)


@dataclass(slots=True, eq=False)
class Request:
    """`arrival` grows from one to the next. Ids of the `prompt` are below 0 where an image's tokens are. `owner` names
    who may share its keys and values: those whose weights are the same; None shares them with nobody. `error` is set as
    soon as one of its sequences cannot go on. Its tokens are told as they are made if it `streams`.
    """

    key: Hashable
    arrival: int
    prompt: list[int]
    adapter: "Adapter | None"
    owner: str | None
    params: SamplingParams
    stop: StopRule
    seed: int
    max_new_tokens: int
    images: Images | None = None
    streams: bool = False
    top_sample: int = 0
    top_prompt: int = 0
    scores: PromptScores | None = None
    sequences: list[SampledSequence | None] = field(default_factory=list[SampledSequence | None])
    sample_tokens: int = 0
    cached_tokens: int | None = None
    error: LorryError | None = None

    @classmethod
    def to_sample(
        cls,
        key: Hashable,
        arrival: int,
        request: "SampleInput",
        prompt: Read,
        adapter: "Adapter | None",
        owner: str | None,
        default_seed: int,
        end_tokens: Sequence[int],
        max_context: int,
        *,
        streams: bool = False,
    ) -> "Request":
        params = request.sampling_params
        room = most_new_tokens(len(prompt.ids), max_context)
        return cls(
            key,
            arrival,
            prompt.ids,
            adapter,
            owner,
            params,
            StopRule.of(params, end_tokens),
            seed=default_seed if params.seed is None else params.seed,
            max_new_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            images=prompt.images,
            streams=streams,
            top_sample=request.topk_sample_logprobs,
            top_prompt=request.topk_prompt_logprobs,
            scores=PromptScores.wanted_by(request),
            sequences=[None] * request.num_samples,
        )

    @classmethod
    def to_score(
        cls,
        key: Hashable,
        arrival: int,
        prompt: Read,
        adapter: "Adapter | None",
        owner: str | None,
    ) -> "Request":
        """Only the prompt's logprobs are wanted."""
        params, scores = SamplingParams(), PromptScores(1, 1)
        rule = StopRule.of(params, ())
        return cls(key, arrival, prompt.ids, adapter, owner, params, rule, 0, 0, prompt.images, scores=scores)

    @property
    def most_computed(self) -> int:
        """How many tokens of each of its sequences the cache may have to hold: the last one is never computed."""
        return len(self.prompt) + max(0, self.max_new_tokens - 1)

    @property
    def scored(self) -> bool:
        """Whether all is known that is wanted of the prompt."""
        return self.scores is None or self.scores.next_position >= len(self.prompt) - 1

    @property
    def complete(self) -> bool:
        return self.error is not None or (self.scored and None not in self.sequences)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt), self.sample_tokens, self.cached_tokens or 0)

    @property
    def result(self) -> SampleResponse | LorryError:
        if self.error is not None:
            return self.error
        sequences = [sequence for sequence in self.sequences if sequence is not None]
        scores, hits = self.scores, self.cached_tokens or 0
        if scores is None:
            return SampleResponse(sequences, prompt_cache_hit_tokens=hits, prompt_tokens=len(self.prompt))
        return SampleResponse(
            sequences,
            self._shown_logprobs(scores),
            scores.show(scores.top) if self.top_prompt else None,
            scores.target_table,
            scores.sparse_targets,
            scores.alternative_tables,
            hits,
            len(self.prompt),
        )

    def let_images_go(self) -> None:
        """They are in the cache."""
        if self.images is not None:
            self.images = self.images.let_go()

    def _shown_logprobs(self, scores: PromptScores) -> list[float | None] | None:
        """An image's tokens have none: no text could have stood in their place."""
        shown = scores.show(scores.logprobs)
        if shown is None or self.images is None:
            return shown
        return [None if token < 0 else logprob for token, logprob in zip(self.prompt, shown, strict=True)]


@dataclass(slots=True, eq=False)
class Held:
    """What of a sequence is in the cache: its first `computed` tokens, in `blocks`; `keys` are those of the full
    blocks that were published."""

    blocks: list[int] = field(default_factory=list[int])
    computed: int = 0
    keys: list[PrefixKey] = field(default_factory=list[PrefixKey])


@dataclass(slots=True, eq=False)
class Row:
    """One sequence that is being decoded: sample number `sample` of its request. Its first `told` tokens were told to
    who reads them as they are made."""

    request: Request
    sample: int
    seed: int
    held: Held = field(default_factory=Held)
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    top: list[TopkLogprobs] = field(default_factory=list[TopkLogprobs])
    told: int = 0

    @property
    def length(self) -> int:
        """Tokens so far, with the prompt: also the place of the next one."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def rank(self) -> tuple[int, int]:
        """Who came first comes first."""
        return self.request.arrival, self.sample

    def slice(self, start: int, end: int) -> list[int]:
        """Tokens `start` to `end`, counted from the beginning of the prompt."""
        prompt = self.request.prompt
        n = len(prompt)
        return prompt[start:end] + self.tokens[max(0, start - n) : max(0, end - n)]

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

    def resume(self, told: Told) -> bool:
        """Goes on after what another actor made of it, and says whether that was all."""
        self.tokens, self.logprobs, self.told = list(told.tokens), list(told.logprobs), len(told.tokens)
        self.top = list(told.topk_logprobs)
        self.request.sample_tokens += len(self.tokens)
        return told.stop_reason is not None and self._end(told.stop_reason)

    def tell(self) -> Piece | None:
        """What was not told yet, if anything."""
        start, self.told = self.told, len(self.tokens)
        if start == self.told:
            return None
        top = self.top[start:] if self.request.top_sample else None
        ended = self.request.sequences[self.sample]
        reason = None if ended is None else ended.stop_reason
        return Piece(self.sample, start, self.tokens[start:], self.logprobs[start:], top, reason)

    def _end(self, reason: StopReason) -> bool:
        top = self.top if self.request.top_sample else None
        self.request.sequences[self.sample] = SampledSequence(reason, self.tokens, self.logprobs, top)
        return True


@dataclass(slots=True, eq=False)
class Stem:
    """What `waiting` rows have in common and what is to be computed before they can go on: the prompt of a request's
    samples, or the whole of one row that was preempted. No rows wait for a prompt that is only scored.

    `logits` [vocab], of the next token, is there when all is computed.
    """

    request: Request
    tokens: list[int]
    waiting: deque[Row]
    held: Held = field(default_factory=Held)
    logits: "Tensor | None" = None

    @property
    def rank(self) -> tuple[int, int]:
        return self.request.arrival, self.waiting[0].sample if self.waiting else 0

    @property
    def ready(self) -> bool:
        return self.held.computed == len(self.tokens)

    def slice(self, start: int, end: int) -> list[int]:
        return self.tokens[start:end]
