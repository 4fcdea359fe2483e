"""Keys and values of the sequences that are decoded together, outside the model: one row each, kept compact.

Attention reads views of it. It knows no tokens, no adapters and no requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attend_sequences, attend_with_sinks

TOKEN_STEP = 64


@dataclass(slots=True)
class _Layer:
    """Zeroed where no row has written: what a mask hides must still be finite."""

    keys: Tensor  # [capacity of rows, kv_heads, capacity of tokens, dim]
    values: Tensor  # [capacity of rows, kv_heads, capacity of tokens, value_dim]


@dataclass(frozen=True, slots=True)
class _Prefill:
    lengths: list[int]
    copies: list[int]


@dataclass(frozen=True, slots=True)
class _Decode:
    """One new token of every row; the packed row's token i belongs to row `order[i]`."""

    order: Tensor  # [rows] int64
    row_of: Tensor | None  # [rows] int64: the place of each row's token; None where both orders are the same
    positions: Tensor  # [rows] int64, of row i
    new_positions: Tensor  # [rows] int64, of token i
    visible: dict[int | None, Tensor] = field(default_factory=dict)  # window -> [rows, 1, 1, length] bool
    bias: dict[int | None, Tensor] = field(default_factory=dict)  # window -> the same as 0 and -inf


class KVCache:
    """For at most `max_rows` sequences of at most `max_tokens`; it grows by need, and frees all when empty.

    Say what comes with `begin_prefill` or `begin_decode`, run the model, then `commit`. Without the commit the cache
    is as it was.
    """

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        self.lengths: list[int] = []
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._layers: dict[int, _Layer] = {}
        self._batch: _Prefill | _Decode | None = None
        self._tokens = 0

    def begin_prefill(self, lengths: Sequence[int], copies: Sequence[int]) -> None:
        """Prompts of these lengths, packed, become `copies` new rows each, behind the others, in order; 0 is none."""
        self._batch = _Prefill(list(lengths), list(copies))
        self._tokens = max((n for n, c in zip(lengths, copies, strict=True) if c), default=0)

    def begin_decode(self, order: Sequence[int], device: torch.device) -> None:
        """One token of every row, that of row `order[i]` in place i."""
        rows, in_order = torch.tensor(order, device=device), list(order) == sorted(order)
        positions = torch.tensor(self.lengths, device=device)
        self._batch = _Decode(rows, None if in_order else rows.argsort(), positions, positions[rows])
        self._tokens = max(self.lengths) + 1

    def commit(self) -> None:
        if isinstance(self._batch, _Prefill):
            for length, copies in zip(self._batch.lengths, self._batch.copies, strict=True):
                self.lengths += [length] * copies
        else:
            self.lengths = [length + 1 for length in self.lengths]
        self._batch = None

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        """The last row takes its place, and nothing of it stays behind: stale NaN would show through any mask."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        for layer in self._layers.values():
            for tensor in (layer.keys, layer.values):
                if row != last:
                    tensor[row, :, length : self.lengths[row]] = 0
                    tensor[row, :, :length] = tensor[last, :, :length]
                tensor[last, :, :length] = 0
        self.lengths[row] = length
        self.lengths.pop()
        if not self.lengths:
            self._layers.clear()

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
        if isinstance(self._batch, _Prefill):
            self._write_prompts(self._batch, layer, key, value)
            output = attend_sequences(query, key, value, self._batch.lengths, scaling, sliding_window, sinks)
            return output.transpose(1, 2)
        assert self._batch is not None, "begin_prefill or begin_decode comes first"
        return self._attend_rows(self._batch, layer, query, key, value, scaling, sliding_window, sinks)

    def _write_prompts(self, batch: _Prefill, layer: int, key: Tensor, value: Tensor) -> None:
        if not self._tokens:
            return
        cached = self._reserve(layer, len(self.lengths) + sum(batch.copies), key, value)
        row, start = len(self.lengths), 0
        for length, copies in zip(batch.lengths, batch.copies, strict=True):
            cached.keys[row : row + copies, :, :length] = key[:, :, start : start + length]
            cached.values[row : row + copies, :, :length] = value[:, :, start : start + length]
            row, start = row + copies, start + length

    def _attend_rows(
        self,
        batch: _Decode,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        rows = len(self.lengths)
        cached = self._reserve(layer, rows, key, value)
        cached.keys[batch.order, :, batch.new_positions] = key[0].transpose(0, 1)
        cached.values[batch.order, :, batch.new_positions] = value[0].transpose(0, 1)
        keys, values = cached.keys[:rows, :, : self._tokens], cached.values[:rows, :, : self._tokens]
        query = query[0].transpose(0, 1)  # [rows, heads, dim]
        if batch.row_of is not None:
            query = query[batch.row_of]
        if sinks is not None:
            visible = self._visible(batch, sliding_window)
            output = attend_with_sinks(query.unsqueeze(2), keys, values, visible, scaling, sinks)
        else:
            # A key's query heads become queries of one head: no key is read twice, and none is repeated in memory.
            bias = self._bias(batch, sliding_window, query.dtype)
            grouped = query.unflatten(1, (keys.shape[1], -1))  # [rows, kv_heads, groups, dim]
            output = F.scaled_dot_product_attention(grouped, keys, values, bias, scale=scaling)
        output = output.reshape(rows, query.shape[1], -1)  # [rows, heads, value_dim]
        if batch.row_of is not None:
            output = output[batch.order]
        return output.transpose(0, 1).unsqueeze(0)

    def _visible(self, batch: _Decode, sliding_window: int | None) -> Tensor:
        if sliding_window not in batch.visible:
            at = torch.arange(self._tokens, device=batch.positions.device)
            distance = batch.positions[:, None] - at  # [rows, length]
            visible = distance >= 0
            if sliding_window is not None:
                visible &= distance < sliding_window
            batch.visible[sliding_window] = visible[:, None, None]
        return batch.visible[sliding_window]

    def _bias(self, batch: _Decode, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        if sliding_window not in batch.bias:
            visible = self._visible(batch, sliding_window)
            zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            batch.bias[sliding_window] = zeros.masked_fill_(~visible, -torch.inf)
        return batch.bias[sliding_window]

    def _reserve(self, layer: int, rows: int, key: Tensor, value: Tensor) -> _Layer:
        """The layer, with room for `rows` and the batch's tokens; what it held is kept."""
        cached = self._layers.get(layer)
        held_rows, held_tokens = (0, 0) if cached is None else (cached.keys.shape[0], cached.keys.shape[2])
        if cached is not None and rows <= held_rows and self._tokens <= held_tokens:
            return cached
        if rows > held_rows:
            held_rows = min(max(rows, 2 * held_rows), self._max_rows)
        if self._tokens > held_tokens:
            wanted = max(self._tokens, held_tokens + held_tokens // 2)
            held_tokens = min(-(-wanted // TOKEN_STEP) * TOKEN_STEP, self._max_tokens)
        grown = _Layer(_zeros(key, held_rows, held_tokens), _zeros(value, held_rows, held_tokens))
        if cached is not None:
            active, length = len(self.lengths), cached.keys.shape[2]
            grown.keys[:active, :, :length] = cached.keys[:active]
            grown.values[:active, :, :length] = cached.values[:active]
        self._layers[layer] = grown
        return grown


def _zeros(like: Tensor, rows: int, tokens: int) -> Tensor:
    return torch.zeros(rows, like.shape[1], tokens, like.shape[3], dtype=like.dtype, device=like.device)
