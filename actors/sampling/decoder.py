"""Continuous batching: sequences of many requests and adapters decode together, and join and leave at any step.

It executes what it is given; it checks no request and knows no tenant. `lineup` decides what a step computes.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ...wire.commands import SampleInput
from ...wire.errors import InvalidRequestError, LorryError
from ...wire.model_input import ModelInput
from ...wire.streaming import Piece, Told
from ...wire.types import SampleResponse
from ..images.layout import count_images
from ..images.looking import Read, read
from ..model.base_model import BaseModel
from ..model.survey import Survey, block_count, survey
from .block_pool import BlockPool
from .compiled import CompiledModel
from .decode_batch import DecodeBatch, sampling_rows
from .decode_linears import DecodeLinears
from .drawn import Drawn, draw_tokens
from .kv_cache import KVCache
from .led_pass import LedPass
from .lineup import Chunk, Lineup, Plan, Seat
from .model_pass import ModelPass
from .narrowing import in_parts
from .sequences import Request, Row, Stem, Usage
from .stopping import Detokenizer
from .tokens import seed_of_sample

if TYPE_CHECKING:
    from ..model.adapter import Adapter

Finished: TypeAlias = tuple[Hashable, SampleResponse | LorryError, Usage]

BLOCK_TOKENS = 16


class Decoder:
    """At most `max_rows` sequences decode together; beside them a step computes at most `prefill_chunk` tokens of
    prompts. Keys and values take at most `kv_cache_bytes`. Where the base is `compiled`, that runs instead; `native`
    is as for DecodeLinears.

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
        *,
        native: bool = False,
    ) -> None:
        self.prompts_computed = 0
        self.tokens_computed = 0
        self.postponed = False
        self._base, self._tokenizer = base, tokenizer
        shape = survey(base)
        blocks = _useful_blocks(shape, kv_cache_bytes, max_rows, base.max_context)
        self.pool = BlockPool(blocks)
        self.lineup = Lineup(self.pool, BLOCK_TOKENS, max_rows, prefill_chunk)
        self._cache = KVCache(shape, blocks, BLOCK_TOKENS, base.device)
        self._linears = DecodeLinears(base, shape.groups, native=native)
        self._pass = _pass(base, compiled, self._linears, self._cache, blocks)
        self._requests: dict[Hashable, Request] = {}
        self._arrivals = 0
        self._over: list[Request] = []  # when they came
        self._spoke: dict[Row, None] = {}  # rows of requests that stream, with tokens that were not told
        self._batch: DecodeBatch | None = None
        self._batch_of: tuple[int, list[Row]] = (-1, [])  # the lineup's count of changes, and the batch's rows
        self._unclean: list[int] = []  # blocks that were handed out and are to be cleared before anything is computed

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
        prompt: Read | None = None,
        *,
        streams: bool = False,
        made: Sequence[Told] = (),
    ) -> None:
        """Queues a request that `check_sample` accepted. Its samples depend on its seed, or else on `default_seed`. Its
        `prompt` may have been read before. Of one that `streams`, `pieces` has the tokens as they are made; `made` is
        what another actor made of it, one for each of its samples, which go on from there.

        Requests of one `owner` share what is computed of equal prompts: it names the weights, and they must never
        change under it. None shares nothing. Raises InvalidRequestError where one sample alone may outgrow the cache.
        """
        base = self._base
        seen = prompt or self._read(request.prompt)
        found = Request.to_sample(
            key,
            self._next(),
            request,
            seen,
            adapter,
            owner,
            default_seed,
            base.end_tokens,
            base.max_context,
            streams=streams,
        )
        rows = [Row(found, i, seed_of_sample(found.seed, i)) for i in range(request.num_samples)]
        self._check_room(found)
        self._join(found, [row for row, told in zip_longest(rows, made) if not (told and row.resume(told))])

    def add_prompt(
        self, key: Hashable, prompt: ModelInput | Read, adapter: "Adapter | None", owner: str | None = None
    ) -> None:
        """Queues a prompt for its logprobs alone: its response has `prompt_logprobs` and no sequences."""
        seen = prompt if isinstance(prompt, Read) else self._read(prompt)
        request = Request.to_score(key, self._next(), seen, adapter, owner)
        self._check_room(request)
        self._join(request, [])

    def cancel(self, key: Hashable) -> Usage | None:
        """The request is forgotten; what was computed for it by now. An unknown key is one that ended already."""
        request = self._requests.pop(key, None)
        if request is None:
            return None
        self.lineup.remove(request)
        self._rest()
        return request.usage if request.cached_tokens is not None else Usage(0, 0)

    @torch.inference_mode()
    def step(self, *, others_hold_memory: bool = False) -> list[Finished]:
        """One token of every sequence, and a chunk of the prompts that wait; returns the requests that ended.

        Where a request finds no memory, it ends; while others hold some that they will give back, it is left as it is,
        and `postponed` says so.
        """
        plan = self.lineup.plan()
        self._unclean += plan.fresh
        later: set[Request] | None = set() if others_hold_memory else None
        ended = dict.fromkeys(self._over) | self._compute(plan, later) | self._seat()
        self._over.clear()
        self.postponed = bool(later)
        for request in ended:
            del self._requests[request.key]
            self.lineup.remove(request)
        if ended:
            self._rest()
        return [(request.key, request.result, request.usage) for request in ended]

    def pieces(self) -> list[tuple[Hashable, list[Piece]]]:
        """What was made since the last time for requests that stream and are not over."""
        told: dict[Request, list[Piece]] = {}
        for row in self._spoke:
            if row.request.key in self._requests and (piece := row.tell()) is not None:
                told.setdefault(row.request, []).append(piece)
        self._spoke.clear()
        return [(request.key, pieces) for request, pieces in told.items()]

    @property
    def bytes_to_come(self) -> int:
        """That the cache will take and has not taken yet."""
        return self._cache.bytes_to_come

    @property
    def sights_bytes(self) -> int:
        """Of what was seen in images of prompts that are still to be computed."""
        return sum(request.images.nbytes for request in self._requests.values() if request.images is not None)

    def _read(self, prompt: ModelInput) -> Read:
        return read(count_images("prompt", prompt, self._base.eyes, self._base.max_context), self._base.eyes)

    def _next(self) -> int:
        self._arrivals += 1
        return self._arrivals

    def _check_room(self, request: Request) -> None:
        if request.key in self._requests:
            raise ValueError(f"{request.key!r} is being sampled already")
        if not self.lineup.fits(request):
            raise _too_long(request, self.pool.blocks * BLOCK_TOKENS)

    def _join(self, request: Request, rows: list[Row]) -> None:
        """Rows that have tokens go on from there, each after its own."""
        self._requests[request.key] = request
        fresh = [row for row in rows if not row.tokens]
        if fresh or not (rows or request.complete):
            self.lineup.join(Stem(request, request.prompt, deque(fresh)))
        for row in rows:
            if row.tokens:
                self.lineup.join(Stem(request, request.prompt + row.tokens, deque([row])))
        if request.complete:
            self._over.append(request)

    def _rest(self) -> None:
        """Requests have left."""
        adapters = (request.adapter for request in self._requests.values())
        self._linears.retain({adapter for adapter in adapters if adapter is not None})
        if not self._requests:
            self._batch = None

    # A step ----------------------------------------------------------------------------------------------------------

    def _compute(self, plan: Plan, later: set[Request] | None) -> dict[Request, None]:
        """The plan through the model, and a token of every row. Returns the requests that ended."""
        pieces: list[Row | Chunk] = [*plan.rows, *plan.chunks]
        ended: dict[Request, None] = {}
        for some, computed in in_parts(pieces, self._attempt, later):
            ended |= self._commit(some, computed)
        return ended | _failed(pieces)

    def _attempt(self, pieces: "Sequence[Row | Chunk]") -> "_Computed":
        """All that may fail, with nothing changed but what another attempt may find as it is: blocks that are clean
        now, prompts that are scored, entries of the cache that will be written again."""
        rows, chunks = _apart(pieces)
        self._pass.clear(self._unclean)
        self._unclean.clear()
        batch = self._decode_batch(rows)
        hidden = self._pass.hidden_states(batch, chunks)  # [tokens, hidden]
        self._pass.score(chunks, hidden[len(rows) :])
        logits = self._pass.logits(batch, chunks, hidden)  # [rows and complete stems, vocab]
        drawn = None if batch is None else draw_tokens(logits[: len(rows)], batch.sampling, batch.places + 1)
        return _Computed(batch, drawn, logits[len(rows) :])

    def _commit(self, pieces: "Sequence[Row | Chunk]", computed: "_Computed") -> dict[Request, None]:
        rows, chunks = _apart(pieces)
        complete = self.lineup.advance(rows, chunks)
        self.tokens_computed += len(rows) + sum(chunk.end - chunk.start for chunk in chunks)
        self.prompts_computed += len(complete)
        for stem, logits in zip([stem for stem in complete if stem.waiting], computed.logits, strict=True):
            stem.logits = logits
        for stem in complete:
            stem.request.let_images_go()
        ended = {stem.request: None for stem in complete if stem.request.complete}
        if computed.batch is not None and computed.drawn is not None:
            ended |= self._accept(computed.batch.rows, computed.drawn)
            computed.batch.advance(computed.drawn.on_device)
        return ended

    def _decode_batch(self, rows: list[Row]) -> DecodeBatch | None:
        if not rows:
            return None
        if self._batch is None or self._batch_of != (self.lineup.changes, rows):
            self._batch = None
            self._batch = DecodeBatch(rows, self._linears, self._cache, self._base.device)
            self._batch_of = self.lineup.changes, rows
        self._batch.refresh()
        return self._batch

    def _seat(self) -> dict[Request, None]:
        """Rows whose stem is complete join and get their first token. Returns the requests that ended."""
        seats = self.lineup.seat()
        ended: dict[Request, None] = {}
        for some, drawn in in_parts(seats, self._start):
            ended |= self._accept([seat.row for seat in some], drawn)
        return ended | _failed(seats)

    def _start(self, seats: Sequence[Seat]) -> Drawn:
        self._pass.copy([pair for seat in seats for pair in seat.copies])
        rows = [seat.row for seat in seats]
        logits = torch.stack([seat.logits for seat in seats if seat.logits is not None])  # [seats, vocab]
        positions = torch.tensor([row.length for row in rows], device=logits.device)
        return draw_tokens(logits, sampling_rows(rows, self._base.device), positions)

    def _accept(self, rows: Sequence[Row], drawn: Drawn) -> dict[Request, None]:
        """Each row gets its token; rows that end leave. Returns the requests that ended."""
        ended: list[Row] = []
        for i, (row, token, logprob) in enumerate(zip(rows, drawn.tokens, drawn.logprobs, strict=True)):
            if row.accept(token, logprob, drawn.top.get(i), self._tokenizer):
                ended.append(row)
            if row.request.streams:
                self._spoke[row] = None
        self.lineup.leave(ended)
        return {row.request: None for row in ended if row.request.complete}


@dataclass(frozen=True, slots=True)
class _Computed:
    """`logits` [stems, vocab] are those of the stems that are complete now and awaited."""

    batch: DecodeBatch | None
    drawn: Drawn | None
    logits: Tensor


def _pass(
    base: BaseModel, compiled: CompiledModel | None, linears: DecodeLinears, cache: KVCache, blocks: int
) -> ModelPass:
    if base.division is None or base.lead is None:
        return ModelPass(base, compiled, linears, cache)
    return LedPass(base, linears, cache, blocks, base.lead, base.division.ranks)


def _apart(pieces: "Sequence[Row | Chunk]") -> tuple[list[Row], list[Chunk]]:
    rows = [piece for piece in pieces if isinstance(piece, Row)]
    return rows, [piece for piece in pieces if isinstance(piece, Chunk)]


def _failed(pieces: "Sequence[Row | Chunk | Seat]") -> dict[Request, None]:
    return {piece.request: None for piece in pieces if piece.request.error is not None}


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
