"""Continuous batching: sequences of many requests and adapters decode together, and join and leave at any step.

It executes what it is given, in order of arrival; it checks no request and knows no tenant.
"""

import math
from collections import deque
from collections.abc import Generator, Hashable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..wire.commands import SampleInput
from ..wire.errors import LorryError, NonFiniteError
from ..wire.types import ModelInput, SampleResponse, TopkLogprobs
from .base_model import BaseModel
from .in_flight import Segment
from .kv_cache import KVCache
from .prompt_logprobs import list_top, score_prompt
from .sampling import MAX_TOP_LOGPROBS, Sampled, SamplingRows, sample, seed_of_sample
from .sequences import Request, Row, Usage
from .stopping import Detokenizer

if TYPE_CHECKING:
    from .adapters import Adapter

T = TypeVar("T")
Finished: TypeAlias = tuple[Hashable, SampleResponse | LorryError, Usage]


@dataclass(frozen=True, slots=True)
class _DecodeBatch:
    """The active rows in the order of a step, which is by adapter; valid until a row joins or leaves."""

    order: list[int]
    rows: list[Row]
    segments: list[Segment]
    sampling: SamplingRows


@dataclass(frozen=True, slots=True)
class _Prompt:
    """`copies` rows of its request begin with this prefill; 0 where only the prompt's logprobs are wanted."""

    request: Request
    copies: int


class Decoder:
    """At most `max_rows` sequences decode together; one prefill takes prompts of `prefill_tokens` tokens, or one.

    `prompts_computed` counts the prompts that went through the model.
    """

    def __init__(self, base: BaseModel, tokenizer: Detokenizer, max_rows: int, prefill_tokens: int) -> None:
        self.prompts_computed = 0
        self._base, self._tokenizer = base, tokenizer
        self._max_rows, self._prefill_tokens = max_rows, prefill_tokens
        self._cache = KVCache(max_rows, base.max_context)
        self._requests: dict[Hashable, Request] = {}
        self._queue: deque[Request] = deque()
        self._rows: list[Row] = []  # as the cache has them
        self._batch: _DecodeBatch | None = None

    @property
    def active(self) -> bool:
        return bool(self._requests)

    def add(self, key: Hashable, request: SampleInput, adapter: "Adapter | None", default_seed: int) -> None:
        """Queues a request that `check_sample` accepted. Its samples depend on its seed, or else on `default_seed`."""
        base = self._base
        self._join(Request.to_sample(key, request, adapter, default_seed, base.end_tokens, base.max_context))

    def add_prompt(self, key: Hashable, prompt: ModelInput, adapter: "Adapter | None") -> None:
        """Queues a prompt for its logprobs alone: its response has `prompt_logprobs` and no sequences."""
        self._join(Request.to_score(key, prompt, adapter))

    def cancel(self, key: Hashable) -> None:
        """The request is forgotten, and nothing is reported of it; an unknown key is one that ended already."""
        request = self._requests.pop(key, None)
        if request is not None:
            self._forget(request)

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Computes the prompts that fit, or else one token of every sequence; returns the requests that ended."""
        if prompts := self._admit():
            ended = self._prefill(prompts)
        elif self._rows:
            ended = self._decode()
        else:
            return []
        for request in ended:
            del self._requests[request.key]
            self._forget(request)
        return [(request.key, request.result, request.usage) for request in ended]

    def _join(self, request: Request) -> None:
        if request.key in self._requests:
            raise ValueError(f"{request.key!r} is being sampled already")
        self._requests[request.key] = request
        self._queue.append(request)

    def _forget(self, request: Request) -> None:
        if request in self._queue:
            self._queue.remove(request)
        self._leave([i for i, row in enumerate(self._rows) if row.request is request])

    def _leave(self, rows: Sequence[int]) -> None:
        for i in sorted(rows, reverse=True):
            self._cache.remove(i)
            last = self._rows.pop()
            if i < len(self._rows):
                self._rows[i] = last
            self._batch = None

    # Prompts ---------------------------------------------------------------------------------------------------------

    def _admit(self) -> list[_Prompt]:
        """In order of arrival. A request of many samples begins when a quarter of the rows is free for it."""
        prompts: list[_Prompt] = []
        free, room = self._max_rows - len(self._rows), self._prefill_tokens
        for request in self._queue:
            copies = min(request.waiting, free)
            if copies < min(request.waiting, math.ceil(self._max_rows / 4)):
                break
            if prompts and len(request.prompt) > room:
                break
            prompts.append(_Prompt(request, copies))
            free, room = free - copies, room - len(request.prompt)
            if copies < request.waiting:
                break
        return _by_adapter(prompts, [prompt.request for prompt in prompts])

    def _prefill(self, prompts: Sequence[_Prompt]) -> list[Request]:
        base, lengths = self._base, [len(prompt.request.prompt) for prompt in prompts]
        tokens = torch.tensor([t for prompt in prompts for t in prompt.request.prompt], device=base.device)
        positions = torch.cat([torch.arange(n, device=base.device) for n in lengths])
        with self._in_flight(lengths, _segments([prompt.request.adapter for prompt in prompts], lengths)):
            self._cache.begin_prefill(lengths, [prompt.copies for prompt in prompts])
            hidden = base.hidden_states(tokens, positions, grad=False)  # [tokens, hidden]
            self._score(prompts, hidden.split(lengths))
            rows, logits = self._first_logits(prompts, hidden, lengths)
        self._cache.commit()
        self._seat(prompts, rows)
        if rows:
            self._accept(rows, _sampling_rows(rows, base.device), logits)
        return [prompt.request for prompt in prompts if prompt.request.complete]

    def _score(self, prompts: Sequence[_Prompt], hidden: Sequence[Tensor]) -> None:
        """Prompt logprobs where they are wanted and not known. hidden: [prompt, hidden] of each."""
        for prompt, states in zip(prompts, hidden, strict=True):
            request = prompt.request
            if request.wants_prompt and request.prompt_logprobs is None:
                found = score_prompt(self._base, states, request.prompt, request.adapter, request.top_prompt)
                request.prompt_logprobs = found
                if not all(math.isfinite(logprob) for logprob in found.logprobs[1:] if logprob is not None):
                    request.error = NonFiniteError("the prompt's logprobs are not finite", field="prompt")

    def _first_logits(
        self, prompts: Sequence[_Prompt], hidden: Tensor, lengths: Sequence[int]
    ) -> tuple[list[Row], Tensor]:
        """The new rows, and the logits of each one's first token, [rows, vocab]; a prompt's are computed once."""
        last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
        starting = [i for i, prompt in enumerate(prompts) if prompt.copies]
        if not starting:
            return [], hidden[:0]
        logits = self._logits(hidden[last[starting]], [prompts[i].request.adapter for i in starting])
        copies = torch.tensor([prompts[i].copies for i in starting], device=hidden.device)
        return [row for i in starting for row in _new_rows(prompts[i])], logits.repeat_interleave(copies, 0)

    def _seat(self, prompts: Sequence[_Prompt], rows: list[Row]) -> None:
        self._rows += rows
        self._batch = None
        self.prompts_computed += len(prompts)
        for prompt in prompts:
            prompt.request.waiting -= prompt.copies
        for _ in prompts:  # they are the first of the queue; the last may have samples left that found no row
            if self._queue[0].waiting == 0:
                self._queue.popleft()

    # Tokens ----------------------------------------------------------------------------------------------------------

    def _decode(self) -> list[Request]:
        base = self._base
        if self._batch is None:
            self._batch = _decode_batch(self._rows, base.device)
        batch = self._batch
        tokens = torch.tensor([row.tokens[-1] for row in batch.rows], device=base.device)
        positions = torch.tensor([row.length - 1 for row in batch.rows], device=base.device)
        with self._in_flight([1] * len(batch.rows), batch.segments):
            self._cache.begin_decode(batch.order, base.device)
            hidden = base.hidden_states(tokens, positions, grad=False)  # [rows, hidden]
            logits = base.logits(hidden)  # [rows, vocab]
        self._cache.commit()
        return self._accept(batch.rows, batch.sampling, logits)

    def _accept(self, rows: Sequence[Row], sampling: SamplingRows, logits: Tensor) -> list[Request]:
        """Samples a token of each of `rows` from logits [rows, vocab]; rows that end leave. Returns ended requests."""
        positions = torch.tensor([row.length for row in rows], device=logits.device)
        sampled = sample(logits, sampling, positions)
        tops = _tops(sampled, sampling)
        ended: set[Row] = set()
        tokens, logprobs = sampled.tokens.tolist(), sampled.logprobs.tolist()
        for i, (row, token, logprob) in enumerate(zip(rows, tokens, logprobs, strict=True)):
            if row.accept(token, logprob, tops.get(i), self._tokenizer):
                ended.add(row)
        if ended:
            self._leave([i for i, row in enumerate(self._rows) if row in ended])
        return list({row.request: None for row in rows if row in ended and row.request.complete})

    def _logits(self, hidden: Tensor, adapters: "Sequence[Adapter | None]") -> Tensor:
        """hidden [rows, hidden] -> [rows, vocab], each row through its own adapter's head."""
        self._base.in_flight.segments = _segments(adapters, [1] * len(adapters))
        return self._base.logits(hidden)

    @contextmanager
    def _in_flight(self, lengths: list[int], segments: list[Segment]) -> Generator[None]:
        in_flight = self._base.in_flight
        in_flight.lengths, in_flight.segments, in_flight.cache = lengths, segments, self._cache
        try:
            yield
        finally:
            in_flight.lengths, in_flight.segments, in_flight.cache = [], [], None


def _new_rows(prompt: _Prompt) -> list[Row]:
    request = prompt.request
    first = len(request.sequences) - request.waiting
    return [Row(request, i, seed_of_sample(request.seed, i)) for i in range(first, first + prompt.copies)]


def _decode_batch(rows: Sequence[Row], device: torch.device) -> _DecodeBatch:
    order = _by_adapter(range(len(rows)), [row.request for row in rows])
    ordered = [rows[i] for i in order]
    segments = _segments([row.request.adapter for row in ordered], [1] * len(rows))
    return _DecodeBatch(order, ordered, segments, _sampling_rows(ordered, device))


def _sampling_rows(rows: Sequence[Row], device: torch.device) -> SamplingRows:
    requests = [row.request for row in rows]
    wants_top = [request.top_sample > 0 for request in requests]
    return SamplingRows.of([request.params for request in requests], [row.seed for row in rows], wants_top, device)


def _by_adapter(items: Sequence[T], requests: Sequence[Request]) -> list[T]:
    """`items`, whose requests are `requests`, with those of one adapter side by side, the first to come first."""
    first: dict[int, int] = {}
    places = [first.setdefault(id(request.adapter), len(first)) for request in requests]
    return [items[i] for i in sorted(range(len(items)), key=places.__getitem__)]


def _segments(adapters: "Sequence[Adapter | None]", lengths: Sequence[int]) -> list[Segment]:
    """Of sequences of these lengths laid end to end; neighbours with one adapter share a segment."""
    segments: list[Segment] = []
    start = 0
    for adapter, length in zip(adapters, lengths, strict=True):
        end = start + length
        if adapter is not None:
            if segments and segments[-1].adapter is adapter and segments[-1].end == start:
                start = segments.pop().start
            segments.append(Segment(adapter, start, end))
        start = end
    return segments


def _tops(sampled: Sampled, sampling: SamplingRows) -> dict[int, TopkLogprobs]:
    """The likeliest tokens of the rows that want them, by place in the batch."""
    if not len(sampling.top):
        return {}
    found = list_top(sampled.top_tokens, sampled.top_logprobs, MAX_TOP_LOGPROBS)
    return dict(zip(sampling.top.tolist(), found, strict=True))
