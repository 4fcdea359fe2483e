"""One packed row of decoding rows and chunks of prompts through the model: hidden states, prompt scores, logits.

It puts in flight what the model reads and takes it away again, whatever happens. It decides nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..images.layout import Seen, Stretch, positions_of, seen_in
from ..model.base_model import BaseModel
from ..model.in_flight import Segment
from ..model.leading import share_seen
from .compiled import CompiledModel
from .decode_batch import DecodeBatch, segments_of
from .decode_linears import DecodeLinears
from .kv_cache import KVCache, PromptChunk, Reading
from .lineup import Chunk
from .prompt_logprobs import score_prompt


@dataclass(frozen=True, slots=True)
class Adapters:
    """Whose tokens a packed row is: `of_rows` those that it begins with, which are `gathered` or walked, and behind
    them `of_chunks`."""

    of_rows: list[Segment]
    of_chunks: list[Segment]
    gathered: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A packed row, and where in the cache its keys and values go and are read."""

    tokens: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] or, with images, [3, tokens] int64
    readings: Sequence[Reading]
    places: Tensor  # [rows] int64
    slots: Tensor  # [rows] int64
    prompts: list[PromptChunk]
    adapters: Adapters
    seen: Seen | None


class ModelPass:
    """Nothing is changed but the cache, where the blocks of rows and chunks get what is new of them."""

    def __init__(self, base: BaseModel, compiled: CompiledModel | None, linears: DecodeLinears, cache: KVCache) -> None:
        self._base, self._compiled, self._linears, self._cache = base, compiled, linears, cache

    def clear(self, blocks: Sequence[int]) -> None:
        """See `KVCache.clear`."""
        self._cache.clear(blocks)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `KVCache.copy`."""
        self._cache.copy(pairs)

    def hidden_states(self, batch: DecodeBatch | None, chunks: Sequence[Chunk]) -> Tensor:
        """[tokens, hidden] of the rows, then of the chunks."""
        return self.run(self._step(batch, chunks), batch)

    def score(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """Prompt logprobs where they are wanted and not known. hidden [tokens, hidden] of the chunks.

        Where it raises, what was scored until then is kept, and another call goes on from there.
        """

        def logits(hidden: Tensor, segments: list[Segment]) -> Tensor:
            return self.head(hidden, Adapters([], segments, gathered=False))

        at = 0
        for chunk in chunks:
            new = chunk.end - chunk.start
            score_prompt(logits, self._base.vocab_size, hidden[at : at + new], chunk.start, chunk.request)
            at += new

    def logits(self, batch: DecodeBatch | None, chunks: Sequence[Chunk], hidden: Tensor) -> Tensor:
        """Of every row, and of every stem that its chunk completes and rows wait for, each through its own adapter's
        head: [rows and stems, vocab]."""
        rows, ends = 0 if batch is None else len(batch.rows), list[int]()
        at = rows
        for chunk in chunks:
            at += chunk.end - chunk.start
            ends.append(at - 1)
        last = [(chunk, end) for chunk, end in zip(chunks, ends, strict=True) if chunk.is_last and chunk.stem.waiting]
        if chunks:
            wanted = [*range(rows), *(end for _, end in last)]
            hidden = hidden[torch.tensor(wanted, dtype=torch.int64, device=hidden.device)]
        if not len(hidden):
            return hidden
        return self.head(hidden, _adapters(batch, [chunk for chunk, _ in last], [1] * len(last)))

    def run(self, step: Step, batch: DecodeBatch | None) -> Tensor:
        """[tokens, hidden]; `batch` is what the step's rows were made of."""
        in_flight, seen = self._base.in_flight, step.seen
        if seen is not None and self._base.division is not None:
            seen = share_seen(seen, self._base.division.ranks, self._base.dtype)
        try:
            self._set(step.adapters)
            self._cache.begin(step.readings, step.places, step.slots, step.prompts)
            in_flight.cache = self._cache
            if self._compiled is not None and seen is None:
                return self._compiled.hidden_states(step.tokens, step.positions)
            return self._base.hidden_states(step.tokens, step.positions, grad=False, seen=seen)
        finally:
            in_flight.cache = None
            self._cache.end()
            self._unset()

    def head(self, hidden: Tensor, adapters: Adapters) -> Tensor:
        """hidden [rows, hidden] -> [rows, vocab]."""
        try:
            self._set(adapters)
            return self._base.logits(hidden)
        finally:
            self._unset()

    def _step(self, batch: DecodeBatch | None, chunks: Sequence[Chunk]) -> Step:
        rows, none = 0 if batch is None else len(batch.rows), torch.empty(0, dtype=torch.int64)
        stretches = [Stretch(chunk.start, chunk.end, chunk.request.images) for chunk in chunks]
        tokens, positions = self._pack(batch, chunks, stretches)
        return Step(
            tokens,
            positions,
            readings=[] if batch is None else batch.readings,
            places=none.to(tokens.device) if batch is None else batch.places,
            slots=none.to(tokens.device) if batch is None else batch.slots,
            prompts=[PromptChunk(chunk.start, chunk.end - chunk.start, chunk.stem.held.blocks) for chunk in chunks],
            adapters=_adapters(batch, chunks, [chunk.end - chunk.start for chunk in chunks]),
            seen=seen_in(stretches, self._base.eyes, self._base.device, at=rows),
        )

    def _pack(
        self, batch: DecodeBatch | None, chunks: Sequence[Chunk], stretches: Sequence[Stretch]
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the packed row, [tokens] int64, and positions, [tokens] or, with images, [3, tokens] int64."""
        if batch is not None and not chunks:
            return batch.tokens, batch.positions
        new = [token for chunk in chunks for token in chunk.stem.slice(chunk.start, chunk.end)]
        tokens = torch.tensor(new, device=self._base.device).clamp_(min=0)
        positions = torch.from_numpy(positions_of(stretches)).to(self._base.device)
        if batch is None:
            return tokens, positions
        of_rows = batch.positions.expand(*positions.shape[:-1], -1)
        return torch.cat((batch.tokens, tokens)), torch.cat((of_rows, positions), -1)

    def _set(self, adapters: Adapters) -> None:
        in_flight = self._base.in_flight
        in_flight.segments = adapters.of_rows + adapters.of_chunks
        in_flight.linears = self._linears
        self._linears.gathering, self._linears.beside = adapters.gathered, adapters.of_chunks

    def _unset(self) -> None:
        self._base.in_flight.segments, self._base.in_flight.linears = [], None
        self._linears.gathering, self._linears.beside = False, ()
        self._linears.forget()


def _adapters(batch: DecodeBatch | None, chunks: Sequence[Chunk], lengths: Sequence[int]) -> Adapters:
    rows = 0 if batch is None else len(batch.rows)
    of_chunks = segments_of([chunk.request.adapter for chunk in chunks], lengths, rows)
    return Adapters([] if batch is None else batch.segments, of_chunks, batch is not None and batch.gathered)
