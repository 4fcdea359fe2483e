"""One packed row of decoding rows and chunks of prompts through the model: hidden states, prompt scores, logits.

It puts in flight what the model reads and takes it away again, whatever happens. It decides nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..images.layout import Stretch, positions_of, seen_in
from ..model.base_model import BaseModel
from .compiled import CompiledModel
from .decode_batch import DecodeBatch, segments_of
from .decode_linears import DecodeLinears
from .kv_cache import KVCache, PromptChunk
from .lineup import Chunk
from .prompt_logprobs import score_prompt


class ModelPass:
    """Nothing is changed but the cache, where the blocks of rows and chunks get what is new of them."""

    def __init__(self, base: BaseModel, compiled: CompiledModel | None, linears: DecodeLinears, cache: KVCache) -> None:
        self._base, self._compiled, self._linears, self._cache = base, compiled, linears, cache

    def hidden_states(self, batch: DecodeBatch | None, chunks: Sequence[Chunk]) -> Tensor:
        """[tokens, hidden] of the rows, then of the chunks."""
        in_flight, rows = self._base.in_flight, 0 if batch is None else len(batch.rows)
        stretches = [Stretch(chunk.start, chunk.end, chunk.request.images) for chunk in chunks]
        seen = seen_in(stretches, self._base.eyes, self._base.device, at=rows)
        tokens, positions = self._pack(batch, chunks, stretches)
        none = torch.empty(0, dtype=torch.int64, device=self._base.device)
        prompts = [PromptChunk(chunk.start, chunk.end - chunk.start, chunk.stem.held.blocks) for chunk in chunks]
        try:
            self._set_adapters(batch, chunks, [chunk.end - chunk.start for chunk in chunks])
            if batch is None:
                self._cache.begin([], none, none, prompts)
            else:
                self._cache.begin(batch.readings, batch.places, batch.slots, prompts)
            in_flight.cache = self._cache
            if self._compiled is not None and seen is None:
                return self._compiled.hidden_states(tokens, positions)
            return self._base.hidden_states(tokens, positions, grad=False, seen=seen)
        finally:
            in_flight.cache = None
            self._cache.end()
            self._clear_adapters()

    def score(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """Prompt logprobs where they are wanted and not known. hidden [tokens, hidden] of the chunks.

        Where it raises, what was scored until then is kept, and another call goes on from there.
        """
        at = 0
        self._base.in_flight.linears = self._linears
        try:
            for chunk in chunks:
                new = chunk.end - chunk.start
                score_prompt(self._base, hidden[at : at + new], chunk.start, chunk.request)
                at += new
        finally:
            self._clear_adapters()

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
        try:
            self._set_adapters(batch, [chunk for chunk, _ in last], [1] * len(last))
            return self._base.logits(hidden)
        finally:
            self._clear_adapters()

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

    def _set_adapters(self, batch: DecodeBatch | None, chunks: Sequence[Chunk], lengths: Sequence[int]) -> None:
        in_flight, rows = self._base.in_flight, 0 if batch is None else len(batch.rows)
        of_chunks = segments_of([chunk.request.adapter for chunk in chunks], lengths, rows)
        of_rows = [] if batch is None else batch.segments
        in_flight.segments = of_rows + of_chunks
        in_flight.linears = self._linears
        self._linears.gathering = batch is not None and batch.gathered
        self._linears.beside = of_chunks

    def _clear_adapters(self) -> None:
        self._base.in_flight.segments, self._base.in_flight.linears = [], None
        self._linears.gathering, self._linears.beside = False, ()
        self._linears.forget()
