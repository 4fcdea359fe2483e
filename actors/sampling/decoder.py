"""Continuous batching: sequences of many requests and adapters decode together, and join and leave at any step.

It executes what it is given; it checks no request and knows no tenant. `lineup` decides what a step computes.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ...wire.commands import SampleInput
from ...wire.errors import InvalidRequestError, LorryError
from ...wire.types import ModelInput, SampleResponse, TopkLogprobs
from ..model.base_model import BaseModel
from ..model.survey import Survey, block_count, survey
from .block_pool import BlockPool
from .compiled import CompiledModel
from .decode_batch import DecodeBatch, sampling_rows, segments_of
from .decode_linears import DecodeLinears
from .kv_cache import KVCache, PromptChunk
from .lineup import Chunk, Lineup, Plan
from .prompt_logprobs import list_top, score_prompt
from .sequences import Request, Row, Stem, Usage
from .stopping import Detokenizer
from .tokens import MAX_TOP_LOGPROBS, Sampled, SamplingRows, sample, seed_of_sample

if TYPE_CHECKING:
    from ..model.adapter import Adapter

Finished: TypeAlias = tuple[Hashable, SampleResponse | LorryError, Usage]

BLOCK_TOKENS = 16


class Decoder:
    """At most `max_rows` sequences decode together; beside them a step computes at most `prefill_chunk` tokens of
    prompts. Keys and values take at most `kv_cache_bytes`. Where the base is `compiled`, that runs instead.

    Adapters must not change while one of their requests is here. `prompts_computed` counts the prompts that went
    through the model, `tokens_computed` the tokens, of prompts and samples.
    """

    def __init__(
        self,
        base: BaseModel,
        tokenizer: Detokenizer,
        max_rows: int,
        prefill_chunk: int,
        kv_cache_bytes: int,
        compiled: CompiledModel | None = None,
    ) -> None:
        self.prompts_computed = 0
        self.tokens_computed = 0
        self._base, self._tokenizer, self._compiled = base, tokenizer, compiled
        shape = survey(base)
        blocks = _useful_blocks(shape, kv_cache_bytes, max_rows, base.max_context)
        self.pool = BlockPool(blocks)
        self.lineup = Lineup(self.pool, BLOCK_TOKENS, max_rows, prefill_chunk)
        self._cache = KVCache(shape, blocks, BLOCK_TOKENS, base.device)
        native = compiled is not None and compiled.native
        self._linears = DecodeLinears(base, shape.groups, native=native)
        self._requests: dict[Hashable, Request] = {}
        self._arrivals = 0
        self._batch: DecodeBatch | None = None
        self._batch_of = -1  # the lineup's count of changes when the batch was made

    @property
    def active(self) -> bool:
        return bool(self._requests)

    def add(
        self,
        key: Hashable,
        request: SampleInput,
        adapter: "Adapter | None",
        default_seed: int,
        owner: str | None = None,
    ) -> None:
        """Queues a request that `check_sample` accepted. Its samples depend on its seed, or else on `default_seed`.

        Requests of one `owner` share what is computed of equal prompts: it names the weights, and they must never
        change under it. None shares nothing. Raises InvalidRequestError where one sample alone may outgrow the cache.
        """
        base = self._base
        found = Request.to_sample(
            key, self._next(), request, adapter, owner, default_seed, base.end_tokens, base.max_context
        )
        rows = [Row(found, i, seed_of_sample(found.seed, i)) for i in range(request.num_samples)]
        self._join(found, rows)

    def add_prompt(
        self, key: Hashable, prompt: ModelInput, adapter: "Adapter | None", owner: str | None = None
    ) -> None:
        """Queues a prompt for its logprobs alone: its response has `prompt_logprobs` and no sequences."""
        self._join(Request.to_score(key, self._next(), prompt, adapter, owner), [])

    def cancel(self, key: Hashable) -> None:
        """The request is forgotten, and nothing is reported of it; an unknown key is one that ended already."""
        request = self._requests.pop(key, None)
        if request is not None:
            self.lineup.remove(request)
            self._rest()

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """One token of every sequence, and a chunk of the prompts that wait; returns the requests that ended."""
        plan = self.lineup.plan()
        ended: dict[Request, None] = {}
        if plan.rows or plan.chunks:
            ended |= self._compute(plan)
        ended |= self._seat()
        for request in ended:
            del self._requests[request.key]
            self.lineup.remove(request)
        if ended:
            self._rest()
        return [(request.key, request.result, request.usage) for request in ended]

    def _next(self) -> int:
        self._arrivals += 1
        return self._arrivals

    def _join(self, request: Request, rows: list[Row]) -> None:
        if request.key in self._requests:
            raise ValueError(f"{request.key!r} is being sampled already")
        if not self.lineup.fits(request):
            raise _too_long(request, self.pool.blocks * BLOCK_TOKENS)
        self._requests[request.key] = request
        self.lineup.join(Stem(request, request.prompt, deque(rows)))

    def _rest(self) -> None:
        """Requests have left."""
        adapters = (request.adapter for request in self._requests.values())
        self._linears.retain({adapter for adapter in adapters if adapter is not None})
        if not self._requests:
            self._batch = None

    # The model -------------------------------------------------------------------------------------------------------

    def _compute(self, plan: Plan) -> dict[Request, None]:
        """The plan through the model; samples a token of every row. Returns the requests that ended."""
        chunks = plan.chunks
        self._cache.clear(plan.fresh)
        batch = self._decode_batch(plan.rows)
        tokens, positions = self._pack(batch, chunks)
        hidden = self._forward(batch, chunks, tokens, positions)  # [tokens, hidden]
        complete = self.lineup.advance(plan)
        self.tokens_computed += len(tokens)
        self.prompts_computed += len(complete)
        failed = self._score(chunks, hidden[len(plan.rows) :])
        logits = self._logits(batch, chunks, hidden)  # [rows and complete stems, vocab]
        for stem, row in zip([stem for stem in complete if stem.waiting], logits[len(plan.rows) :], strict=True):
            stem.logits = row
        if batch is None:
            return failed
        return failed | self._accept(batch.rows, batch.sampling, logits[: len(plan.rows)], batch)

    def _decode_batch(self, rows: list[Row]) -> DecodeBatch | None:
        if not rows:
            return None
        if self._batch is None or self._batch_of != self.lineup.changes:
            self._batch = DecodeBatch(rows, self._linears, self._cache, self._base.device)
            self._batch_of = self.lineup.changes
        self._batch.refresh()
        return self._batch

    def _pack(self, batch: DecodeBatch | None, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        """Tokens and positions of the packed row, [tokens] int64 each: rows, then chunks."""
        device = self._base.device
        new = [token for chunk in chunks for token in chunk.stem.slice(chunk.start, chunk.end)]
        at = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
        if batch is None:
            return torch.tensor(new, device=device), torch.tensor(at, device=device)
        if not new:
            return batch.tokens, batch.positions
        tokens = torch.cat((batch.tokens, torch.tensor(new, device=device)))
        return tokens, torch.cat((batch.positions, torch.tensor(at, device=device)))

    def _forward(self, batch: DecodeBatch | None, chunks: Sequence[Chunk], tokens: Tensor, positions: Tensor) -> Tensor:
        in_flight, rows = self._base.in_flight, 0 if batch is None else len(batch.rows)
        none = torch.empty(0, dtype=torch.int64, device=self._base.device)
        prompts = [PromptChunk(chunk.start, chunk.end - chunk.start, chunk.stem.held.blocks) for chunk in chunks]
        self._set_adapters(batch, chunks, [chunk.end - chunk.start for chunk in chunks])
        if batch is None:
            self._cache.begin([], none, none, prompts)
        else:
            self._cache.begin(batch.readings, positions[:rows], batch.slots, prompts)
        in_flight.cache = self._cache
        try:
            if self._compiled is not None:
                return self._compiled.hidden_states(tokens, positions)
            return self._base.hidden_states(tokens, positions, grad=False)
        finally:
            in_flight.cache = None
            self._cache.end()
            self._clear_adapters()

    def _logits(self, batch: DecodeBatch | None, chunks: Sequence[Chunk], hidden: Tensor) -> Tensor:
        """Of every row and every stem that is complete and awaited, each through its own adapter's head."""
        rows, ends = 0 if batch is None else len(batch.rows), list[int]()
        at = rows
        for chunk in chunks:
            at += chunk.end - chunk.start
            ends.append(at - 1)
        last = [(chunk, end) for chunk, end in zip(chunks, ends, strict=True) if _is_awaited(chunk)]
        if chunks:
            wanted = [*range(rows), *(end for _, end in last)]
            hidden = hidden[torch.tensor(wanted, dtype=torch.int64, device=hidden.device)]
        if not len(hidden):
            return hidden
        self._set_adapters(batch, [chunk for chunk, _ in last], [1] * len(last))
        try:
            return self._base.logits(hidden)
        finally:
            self._clear_adapters()

    def _set_adapters(self, batch: DecodeBatch | None, chunks: Sequence[Chunk], lengths: Sequence[int]) -> None:
        in_flight, rows = self._base.in_flight, 0 if batch is None else len(batch.rows)
        in_flight.segments = segments_of([chunk.stem.request.adapter for chunk in chunks], lengths, rows)
        in_flight.linears = self._linears
        self._linears.gathering = batch is not None and batch.gathered
        if batch is not None:
            in_flight.segments = batch.segments + in_flight.segments

    def _clear_adapters(self) -> None:
        self._base.in_flight.segments, self._base.in_flight.linears = [], None
        self._linears.gathering = False
        self._linears.forget()

    # What comes of it ------------------------------------------------------------------------------------------------

    def _score(self, chunks: Sequence[Chunk], hidden: Tensor) -> dict[Request, None]:
        """Prompt logprobs where they are wanted and not known. hidden [tokens, hidden] of the chunks.

        Returns the requests that ended with it.
        """
        ended: dict[Request, None] = {}
        at = 0
        self._base.in_flight.linears = self._linears
        for chunk in chunks:
            request, new = chunk.stem.request, chunk.end - chunk.start
            score_prompt(self._base, hidden[at : at + new], chunk.start, request)
            at += new
            if request.error is not None or (chunk.stem.ready and request.complete):
                ended[request] = None
        self._clear_adapters()
        return ended

    def _seat(self) -> dict[Request, None]:
        """Rows whose stem is complete join and get their first token. Returns the requests that ended."""
        seats = self.lineup.seat()
        if not seats.rows:
            return {}
        self._cache.copy(seats.copies)
        rows = [row for row, _ in seats.rows]
        logits = torch.stack([stem.logits for _, stem in seats.rows if stem.logits is not None])
        return self._accept(rows, sampling_rows(rows, self._base.device), logits, None)

    def _accept(
        self, rows: Sequence[Row], sampling: SamplingRows, logits: Tensor, batch: DecodeBatch | None
    ) -> dict[Request, None]:
        """Samples a token of each of `rows` from logits [rows, vocab]; rows that end leave. Returns ended requests."""
        if batch is None:
            positions = torch.tensor([row.length for row in rows], device=logits.device)
        else:
            positions = batch.positions + 1
        sampled = sample(logits, sampling, positions)
        tops = _tops(sampled, sampling)
        ended: list[Row] = []
        # One read from the device, in a type that holds tokens and logprobs exactly.
        tokens, logprobs = torch.stack((sampled.tokens.double(), sampled.logprobs.double())).tolist()
        for i, (row, token, logprob) in enumerate(zip(rows, tokens, logprobs, strict=True)):
            if row.accept(int(token), logprob, tops.get(i), self._tokenizer):
                ended.append(row)
        if batch is not None:
            batch.advance(sampled.tokens)
        self.lineup.leave(ended)
        return {row.request: None for row in ended if row.request.complete}


def _useful_blocks(shape: Survey, kv_cache_bytes: int, max_rows: int, max_context: int) -> int:
    """As many as fit into the memory, and no more than all rows at their longest would fill twice."""
    most = 2 * max_rows * -(-max_context // BLOCK_TOKENS)
    return min(most, block_count(kv_cache_bytes, shape.token_bytes, BLOCK_TOKENS))


def _too_long(request: Request, room: int) -> InvalidRequestError:
    """For a cache of `room` tokens."""
    if not request.max_new_tokens:
        return InvalidRequestError.of("prompt.length", len(request.prompt), f"at most {room}, this actor's cache")
    wanted = f"at most {room + 1} tokens of prompt and sample together: all but the last have to fit this actor's cache"
    longest = len(request.prompt) + request.max_new_tokens
    return InvalidRequestError.of("prompt.length + sampling_params.max_tokens", longest, wanted)


def _is_awaited(chunk: Chunk) -> bool:
    return chunk.stem.ready and bool(chunk.stem.waiting)


def _tops(sampled: Sampled, sampling: SamplingRows) -> dict[int, TopkLogprobs]:
    """The likeliest tokens of the rows that want them, by place in the batch."""
    if not len(sampling.top):
        return {}
    found = list_top(sampled.top_tokens, sampled.top_logprobs, MAX_TOP_LOGPROBS)
    return dict(zip(sampling.top.tolist(), found, strict=True))
