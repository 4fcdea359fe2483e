"""Keys and values of all sequences in blocks of a fixed number of tokens, outside the model.

Attention writes what is new and reads each sequence through its table of blocks. It knows no tokens, no adapters and
no requests, and does not decide which block is whose.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from ..model.attention import attend, attend_sequences, attend_with_sinks, dot_product_attention
from ..model.probe import LayerShape
from ..model.survey import Survey

READ_ELEMENTS = 2**24
"""How many elements of keys and values the rows of one read have together: 64 MiB of float32."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Decoding rows of about one length, which are read at once. `rows` is None where they are all the rows."""

    rows: Tensor | None  # [n] int64, places in the packed row
    blocks: Tensor  # [n * width] int64: each row's table, filled up with the blank block
    width: int


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """`new` tokens in the packed row, behind `start` that are in `blocks` already."""

    start: int
    new: int
    blocks: Sequence[int]


@dataclass(slots=True)
class _Batch:
    readings: Sequence[Reading]
    places: Tensor  # [rows] int64
    chunks: Sequence[PromptChunk]
    slots: Tensor  # [tokens] int64: where each token's key and value go, as block * block_tokens + offset
    visible: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)  # [n, 1, 1, length] bool
    bias: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)  # the same as 0 and -inf


class KVCache:
    """`blocks` blocks of `block_tokens` tokens, and a blank one of zeros behind them.

    Say what comes with `begin`, run the model, then `end`. Memory of blocks that were never written is never touched
    where the device hands it out lazily, as the CPU does.
    """

    def __init__(self, shape: Survey, blocks: int, block_tokens: int, device: torch.device) -> None:
        self.blank = blocks
        self.block_tokens = block_tokens
        self._shapes, self._dtype, self._device = shape.layers, shape.dtype, device
        self._layers: dict[int, Tensor] = {}  # [blocks + 1, block_tokens, kv_heads, dim + value_dim]
        self._read = torch.empty(0, dtype=self._dtype, device=device)
        self._batch: _Batch | None = None
        self._most_elements = max(layer.kv_heads * layer.width for layer in shape.layers.values()) * block_tokens

    @property
    def bytes_to_come(self) -> int:
        """Of layers that nothing was written to yet: their memory is taken when something is."""
        taken, numbers = self._layers, (self.blank + 1) * self.block_tokens * self._dtype.itemsize
        return sum(numbers * s.kv_heads * s.width for index, s in self._shapes.items() if index not in taken)

    def clear(self, blocks: Sequence[int]) -> None:
        """What a mask hides must still be finite, so a block is zeroed before its first token."""
        if blocks:
            index = torch.tensor(blocks, device=self._device)
            for layer in self._all_layers():
                layer.index_fill_(0, index, 0)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """The second block of each pair becomes what the first one is."""
        if pairs:
            source, target = torch.tensor(pairs, device=self._device).T.contiguous()
            for layer in self._all_layers():
                layer.index_copy_(0, target, layer.index_select(0, source))

    def plan_readings(self, tables: Sequence[Sequence[int]]) -> list[Reading]:
        """Tables of decoding rows, in the packed row's order."""
        groups = group_by_width([len(table) for table in tables], max(1, READ_ELEMENTS // self._most_elements))
        readings: list[Reading] = []
        for group in groups:
            width = max(len(tables[i]) for i in group)
            blocks = [block for i in group for block in (*tables[i], *[self.blank] * (width - len(tables[i])))]
            rows = None if len(groups) == 1 else torch.tensor(group, device=self._device)
            readings.append(Reading(rows, torch.tensor(blocks, device=self._device), width))
        return readings

    def begin(self, readings: Sequence[Reading], places: Tensor, slots: Tensor, chunks: Sequence[PromptChunk]) -> None:
        """The packed row is one token of each decoding row, at `places` [rows], whose key and value go to `slots`
        [rows], and then the chunks."""
        n = self.block_tokens
        own = [chunk.blocks[at // n] * n + at % n for chunk in chunks for at in range(chunk.start, _end(chunk))]
        if own:
            slots = torch.cat((slots, torch.tensor(own, device=self._device)))
        self._batch = _Batch(readings, places, chunks, slots)

    def end(self) -> None:
        self._batch = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim] -> [1, heads, tokens, value_dim]."""
        batch, shape = self._batch, self._shapes[layer]
        assert batch is not None, "begin comes first"
        cached = self._layer(layer)
        entries = torch.cat((key[0], value[0]), -1).transpose(0, 1)  # [tokens, kv_heads, width]
        cached.flatten(0, 1).index_copy_(0, batch.slots, entries.to(cached.dtype))
        rows = len(batch.places)
        outputs: list[Tensor] = []  # [heads, some tokens, value_dim] each
        if rows:
            outputs.append(self._attend_rows(batch, cached, shape, query[0, :, :rows], scaling, sliding_window, sinks))
        start = rows
        for fresh, group in groupby(batch.chunks, key=lambda chunk: chunk.start == 0):
            chunks = list(group)
            end = start + sum(chunk.new for chunk in chunks)
            q, k, v = (x[:, :, start:end] for x in (query, key, value))
            if fresh:
                lengths = [chunk.new for chunk in chunks]
                output = attend_sequences(q, k, v, lengths, scaling, sliding_window, sinks)
                outputs.append(output[0].transpose(0, 1))
            else:
                outputs += self._attend_chunks(chunks, cached, shape, q, scaling, sliding_window, sinks)
            start = end
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).unsqueeze(0)

    def _attend_rows(
        self,
        batch: _Batch,
        cached: Tensor,
        shape: LayerShape,
        query: Tensor,
        scaling: float,
        sliding_window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """query [heads, rows, dim] -> [heads, rows, value_dim]; one token a row."""
        query = query.transpose(0, 1)  # [rows, heads, dim]
        output = query.new_empty(0)
        for i, reading in enumerate(batch.readings):
            some = query if reading.rows is None else query[reading.rows]  # [n, heads, dim]
            keys, values = self._gather(cached, reading, shape, len(some))
            visible = self._visible(batch, i, sliding_window)
            if sinks is not None:
                found = attend_with_sinks(some.unsqueeze(2), keys, values, visible, scaling, sinks).squeeze(2)
            else:
                # A key's query heads become queries of one head: no key is read twice, and none is repeated in memory.
                grouped = some.unflatten(1, (shape.kv_heads, -1))  # [n, kv_heads, groups, dim]
                bias = self._bias(batch, i, sliding_window, query.dtype)
                found = dot_product_attention(grouped, keys, values, bias, scaling).flatten(1, 2)
            if reading.rows is None:
                return found.transpose(0, 1)
            if not output.numel():
                output = found.new_empty(len(query), *found.shape[1:])
            output[reading.rows] = found
        return output.transpose(0, 1)

    def _gather(self, cached: Tensor, reading: Reading, shape: LayerShape, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a reading's rows, [rows, kv_heads, length, dim], in memory that the next read reuses."""
        size = (len(reading.blocks), *cached.shape[1:])
        elements = cached[0].numel() * len(reading.blocks)
        if len(self._read) < elements:
            self._read = torch.empty(elements, dtype=self._dtype, device=self._device)
        target = self._read[:elements].view(size)
        torch.index_select(cached, 0, reading.blocks, out=target)
        entries = target.view(rows, -1, shape.kv_heads, shape.width).transpose(1, 2)
        return entries[..., : shape.dim], entries[..., shape.dim :]

    def _attend_chunks(
        self,
        chunks: Sequence[PromptChunk],
        cached: Tensor,
        shape: LayerShape,
        query: Tensor,
        scaling: float,
        sliding_window: int | None,
        sinks: Tensor | None,
    ) -> list[Tensor]:
        """Each after what is computed of its own prompt. query [1, heads, tokens, dim] -> [heads, new, value_dim]."""
        outputs: list[Tensor] = []
        at = 0
        for chunk in chunks:
            entries = cached[torch.tensor(chunk.blocks, device=self._device)]
            entries = entries.flatten(0, 1)[: _end(chunk)].transpose(0, 1).unsqueeze(0)  # [1, kv_heads, end, width]
            q = query[:, :, at : at + chunk.new]
            keys, values = entries[..., : shape.dim], entries[..., shape.dim :]
            outputs.append(attend(q, keys, values, scaling, sliding_window, sinks)[0])
            at += chunk.new
        return outputs

    def _visible(self, batch: _Batch, i: int, sliding_window: int | None) -> Tensor:
        if (i, sliding_window) not in batch.visible:
            reading = batch.readings[i]
            places = batch.places if reading.rows is None else batch.places[reading.rows]
            at = torch.arange(reading.width * self.block_tokens, device=self._device)
            visible = places[:, None] >= at  # [n, length]
            if sliding_window is not None:
                visible &= places[:, None] < at + sliding_window
            batch.visible[i, sliding_window] = visible[:, None, None]
        return batch.visible[i, sliding_window]

    def _bias(self, batch: _Batch, i: int, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        if (i, sliding_window) not in batch.bias:
            visible = self._visible(batch, i, sliding_window)
            zeros = torch.zeros(visible.shape, dtype=dtype, device=self._device)
            batch.bias[i, sliding_window] = zeros.masked_fill_(~visible, -torch.inf)
        return batch.bias[i, sliding_window]

    def _all_layers(self) -> list[Tensor]:
        return [self._layer(i) for i in self._shapes]

    def _layer(self, index: int) -> Tensor:
        if index not in self._layers:
            shape = self._shapes[index]
            size = (self.blank + 1, self.block_tokens, shape.kv_heads, shape.width)
            layer = torch.empty(size, dtype=self._dtype, device=self._device)
            layer[self.blank] = 0
            self._layers[index] = layer
        return self._layers[index]


def group_by_width(widths: Sequence[int], most: int) -> list[list[int]]:
    """Places of tables, those of about one width together: filled up to the widest, none of a group more than doubles,
    but for a few blocks, and no group but one of a single table holds more than `most` blocks."""
    groups: list[list[int]] = []
    narrowest = 0
    for i in sorted(range(len(widths)), key=widths.__getitem__):
        full = not groups or (len(groups[-1]) + 1) * widths[i] > most
        if full or widths[i] > 2 * narrowest + 4:
            groups.append([])
            narrowest = widths[i]
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def _end(chunk: PromptChunk) -> int:
    return chunk.start + chunk.new
