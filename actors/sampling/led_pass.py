"""A model pass of several ranks: the first tells the others what it does."""

from collections.abc import Sequence
from itertools import count

import msgspec
from torch import Tensor

from ...wire.types import TensorData
from ..model.base_model import BaseModel
from ..model.leading import Lead, SeenHead, Stretch, packed, seen_head
from ..model.ranks import Ranks
from .decode_batch import DecodeBatch
from .decode_linears import DecodeLinears
from .kv_cache import KVCache
from .model_pass import Adapters, ModelPass, Step

_numbers = count()


class BeginSampling(msgspec.Struct, frozen=True, tag=True):
    """Steps of that decoder will come, whose cache has so many blocks."""

    decoder: int
    blocks: int
    block_tokens: int


class Clear(msgspec.Struct, frozen=True, tag=True):
    decoder: int
    blocks: list[int]


class Copy(msgspec.Struct, frozen=True, tag=True):
    decoder: int
    pairs: list[tuple[int, int]]


class Whose(msgspec.Struct, frozen=True):
    """Adapters as they travel."""

    of_rows: list[Stretch]
    of_chunks: list[Stretch]
    gathered: bool


class Decode(msgspec.Struct, frozen=True, tag=True):
    """A Step as it travels. Without `tables` of blocks, those of the rows are as in the step before; and so are the
    rows themselves, if they are not `new_rows`."""

    decoder: int
    tokens: TensorData
    positions: TensorData
    new_rows: bool
    tables: list[list[int]] | None
    places: TensorData
    slots: TensorData
    prompts: list[tuple[int, int, list[int]]]
    whose: Whose
    seen: SeenHead | None


class Head(msgspec.Struct, frozen=True, tag=True):
    """So many rows of hidden states follow, whose logits are wanted."""

    decoder: int
    rows: int
    whose: Whose


class LedPass(ModelPass):
    def __init__(
        self, base: BaseModel, linears: DecodeLinears, cache: KVCache, blocks: int, lead: Lead, ranks: Ranks
    ) -> None:
        super().__init__(base, None, linears, cache)
        self._lead, self._ranks, self._decoder = lead, ranks, next(_numbers)
        self._told: tuple[object, object] = None, None  # what the others know: rows, and their blocks
        lead.run(BeginSampling(self._decoder, blocks, cache.block_tokens), lambda: None)

    def clear(self, blocks: Sequence[int]) -> None:
        if blocks:
            self._lead.run(Clear(self._decoder, list(blocks)), lambda: super(LedPass, self).clear(blocks))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        if pairs:
            self._lead.run(Copy(self._decoder, list(pairs)), lambda: super(LedPass, self).copy(pairs))

    def run(self, step: Step, batch: DecodeBatch | None) -> Tensor:
        tables = None
        if batch is not None and batch.readings is not self._told[1]:
            tables = [list(row.held.blocks) for row in batch.rows]
        command = Decode(
            self._decoder,
            packed(step.tokens),
            packed(step.positions),
            batch is not None and batch is not self._told[0],
            tables,
            packed(step.places),
            packed(step.slots),
            [(prompt.start, prompt.new, list(prompt.blocks)) for prompt in step.prompts],
            self._whose(step.adapters),
            seen_head(step.seen),
        )
        told, self._told = self._told, (None, None)  # should it fail, nobody knows what the others have
        hidden = self._lead.run(command, lambda: super(LedPass, self).run(step, batch))
        self._told = told if batch is None else (batch, batch.readings)
        return hidden

    def head(self, hidden: Tensor, adapters: Adapters) -> Tensor:
        def mine() -> Tensor:
            return super(LedPass, self).head(self._ranks.from_first(hidden.contiguous()), adapters)

        return self._lead.run(Head(self._decoder, len(hidden), self._whose(adapters)), mine)

    def _whose(self, adapters: Adapters) -> Whose:
        stretches = self._lead.numbers_of([*adapters.of_rows, *adapters.of_chunks])
        rows = len(adapters.of_rows)
        return Whose(stretches[:rows], stretches[rows:], adapters.gathered)
