"""Attention over packed sequences: the one function that turns a transformers decoder into a multi-tenant engine.

It reads the sequences' lengths from the model's InFlight object. It never pads, and never guesses: what it does not
understand it refuses.
"""

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from ...wire.errors import UnsupportedModelError
from . import operators
from .in_flight import InFlight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED = "lorry"
PROBED = "lorry_probed"
"""The same function with masks on, so that it can compare the window of a layer's mask with the one the layer passes.
Masks cost time in every forward, so models run under PROBED once, when they are wrapped."""

_LEAST_QUERIES = 16
_OF_A_WINDOW = 256
SCORES_OF_A_BLOCK = 2**24
"""Of a block, at most, but for that: 64 MiB of float32."""

IGNORED_OPTIONS = frozenset(("position_ids", "position_embeddings", "use_cache", "is_causal"))


def set_attention(model: nn.Module, in_flight: InFlight) -> None:
    """Lets every attention module of `model` find `in_flight`."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.in_flight = in_flight  # pyright: ignore[reportArgumentType]


def set_decoders_attention(model: "PreTrainedModel", implementation: str) -> None:
    """Of the part that reads text; eyes, where there are some, attend as they did."""
    is_part = model.config.get_text_config() is not model.config
    model.set_attn_implementation({"text_config": implementation} if is_part else implementation)


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence to itself; with a cache in flight, whatever the cache makes of it.

    query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim] -> [1, tokens, heads, value_dim].
    Raises UnsupportedModelError for an option that would change the result and is not known here, as a softcap is.
    """
    _refuse_unknown(dropout, options)
    if attention_mask is not None and (attention_mask.item() or None) != (sliding_window or None):
        raise UnsupportedModelError("a layer's mask has a sliding window that its attention call does not name")
    in_flight: InFlight = module.in_flight  # pyright: ignore[reportAssignmentType]
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    window = sliding_window or None
    if scaling is None:
        scaling = 1 / math.sqrt(query.shape[-1])
    if torch.compiler.is_compiling():
        return operators.attend(query, key, value, in_flight, layer, scaling, window, s_aux), None
    if in_flight.cache is not None:
        output = in_flight.cache.attend(layer, query, key, value, scaling, window, s_aux)
        return output.transpose(1, 2), None  # [1, tokens, heads, value_dim]
    return attend_sequences(query, key, value, in_flight.lengths, scaling, window, s_aux), None


def attend_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scaling: float,
    sliding_window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Neighbours of equal length share one call. Shapes as in `attend_packed`; sinks [heads]."""
    outputs: list[Tensor] = []
    for rows, length, start in _equal_neighbours(lengths):
        q, k, v = (_as_rows(x, rows, length, start) for x in (query, key, value))
        output = attend(q, k, v, scaling, sliding_window, sinks)  # [rows, heads, length, value_dim]
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # [rows * length, heads, value_dim]
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return packed.unsqueeze(0)


def attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float, sinks: Tensor
) -> Tensor:
    """Each head's sink is a logit that takes probability and gives no value, as in GPT-OSS (arXiv:2508.10925).

    query [rows, heads, new, dim], key and value [rows, kv_heads, length, dim], visible [rows or 1, 1, new, length]
    bool, sinks [heads] -> [rows, heads, new, value_dim]. Keys and values are read as they are, not once per head.
    """
    rows, heads, new, _ = query.shape
    kv_heads, groups = key.shape[1], heads // key.shape[1]
    grouped = query.reshape(rows, kv_heads, groups * new, -1)
    scores = (grouped @ key.mT).view(rows, heads, new, -1) * scaling  # [rows, heads, new, length]
    sink = sinks.view(1, -1, 1, 1).expand(rows, heads, new, 1)
    scores = torch.cat((scores.masked_fill(~visible, -torch.inf), sink), -1)
    probabilities = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., :-1]
    return (probabilities.reshape(rows, kv_heads, groups * new, -1) @ value).view(rows, heads, new, -1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, sliding_window: int | None, sinks: Tensor | None
) -> Tensor:
    """Causal; the queries are those of the last of the keys' tokens.

    query [rows, heads, new, dim], key and value [rows, kv_heads, length, dim] -> [rows, heads, new, value_dim].
    """
    new, length = query.shape[2], key.shape[2]
    if new == length and sinks is None and (sliding_window is None or length <= sliding_window):
        gqa = query.shape[1] != key.shape[1]
        return dot_product_attention(query, key, value, None, scaling, is_causal=True, enable_gqa=gqa)
    if new == length:
        return attend_in_blocks(query, key, value, scaling, sliding_window, sinks)
    return attend_block(query, key, value, scaling, sliding_window, sinks)


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, sliding_window: int | None, sinks: Tensor | None
) -> Tensor:
    """As `attend`, of whole sequences, some queries at a time with the keys that they see; in the backward each block
    is computed again. So the scores of one block alone are ever in memory."""
    if torch.is_grad_enabled():
        return _InBlocks.apply(query, key, value, scaling, sliding_window, sinks)
    return _in_blocks(query, key, value, scaling, sliding_window, sinks)


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, sliding_window: int | None, sinks: Tensor | None
) -> Tensor:
    outputs = [
        attend_block(
            query[:, :, start:end], key[:, :, first:end], value[:, :, first:end], scaling, sliding_window, sinks
        )
        for start, end, first in _blocks(query, sliding_window)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _blocks(query: Tensor, sliding_window: int | None) -> Iterator[tuple[int, int, int]]:
    """(first query, the one behind the last, first key that they see) of each."""
    rows, heads, length, _ = query.shape
    # Of a window, blocks of its own size are enough: larger ones have more scores that nobody sees.
    most = length if sliding_window is None else min(length, max(sliding_window, _OF_A_WINDOW))
    seen = length if sliding_window is None else min(length, most + sliding_window)
    size = min(most, max(_LEAST_QUERIES, SCORES_OF_A_BLOCK // (rows * heads * seen)))
    for start in range(0, length, size):
        first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        yield start, min(start + size, length), first


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.rest = scaling, sliding_window
        return _in_blocks(query, key, value, scaling, sliding_window, sinks)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, sinks = ctx.saved_tensors
        scaling, sliding_window = ctx.rest
        # A key is seen by many blocks: no sum of theirs is rounded to a lower precision on its way.
        grads = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (query, key, value)]
        for start, end, first in _blocks(query, sliding_window):
            places = (slice(start, end), slice(first, end), slice(first, end))
            block = [
                tensor[:, :, place].detach().requires_grad_()
                for tensor, place in zip((query, key, value), places, strict=True)
            ]
            with torch.enable_grad():
                output = attend_block(block[0], block[1], block[2], scaling, sliding_window, sinks)
            found = torch.autograd.grad(output, block, dy[:, :, start:end])
            for grad, place, more in zip(grads, places, found, strict=True):
                grad[:, :, place] += more
        return *(grad.to(query.dtype) for grad in grads), None, None, None


def attend_block(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, sliding_window: int | None, sinks: Tensor | None
) -> Tensor:
    """As `attend`, all at once: [new, length] is in memory, with sinks for every head."""
    new, length = query.shape[2], key.shape[2]
    position = torch.arange(length, device=query.device)
    distance = position[length - new :, None] - position  # [new, length]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    if sinks is not None:
        return attend_with_sinks(query, key, value, visible, scaling, sinks)
    return dot_product_attention(query, key, value, visible, scaling, enable_gqa=query.shape[1] != key.shape[1])


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's own; on the CPU in float32 whatever the dtype. Its low-precision kernel there rounds in blocks of queries
    and keys, and so a token that is decoded would not get what the same token gets in training."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype != torch.float32:
        query, key, value = query.float(), key.float(), value.float()
        mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    if query.is_meta and mask is None and query.shape[-1] == value.shape[-1]:
        # What a fused kernel keeps, which torch has for every device but this one.
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, is_causal, scale=scaling)[0].to(dtype)
    output = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scaling, enable_gqa=enable_gqa
    )
    return output.to(dtype)


def _equal_neighbours(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """(rows, length, start) of each run of sequences of equal length."""
    start = 0
    for length, group in groupby(lengths):
        rows = sum(1 for _ in group)
        yield rows, length, start
        start += rows * length


def _as_rows(x: Tensor, rows: int, length: int, start: int) -> Tensor:
    """A view: [1, heads, tokens, dim] -> [rows, heads, length, dim]."""
    return x[0, :, start : start + rows * length].unflatten(1, (rows, length)).transpose(0, 1)


def _refuse_unknown(dropout: float, options: dict[str, Any]) -> None:
    if dropout:
        raise UnsupportedModelError(f"attention dropout is {dropout}, and a frozen model in eval mode has none")
    if options.get("is_causal") is False:
        raise UnsupportedModelError("a layer's attention is not causal")
    for name, value in options.items():
        if value is not None and value is not False and name not in IGNORED_OPTIONS:
            raise UnsupportedModelError(f"attention takes {name}={value!r:.60}, which is not known here")


def _window_of_mask(
    mask_function: Callable[..., Tensor | bool],
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """In place of a mask, its window as a number, [1, 1, 1, 1]: 0 is plain causal. Read by `attend_packed`.

    Raises UnsupportedModelError where `mask_function(row, head, query, key)` is neither causal nor a sliding window:
    the chunks of Llama 4 have a `local_size` too.
    """
    row = torch.zeros((), dtype=torch.long, device=device)
    window = local_size or 0
    expected = [(0, 1, False), (1, 0, True), *([(window, 0, False), (window, 1, True)] if window > 1 else [])]
    if any(bool(mask_function(row, row, row + q, row + k)) != visible for q, k, visible in expected):
        raise UnsupportedModelError("a layer's mask is neither causal nor a sliding window")
    return torch.full((1, 1, 1, 1), window, device=device)


AttentionInterface.register(PACKED, attend_packed)  # pyright: ignore[reportArgumentType]
AttentionInterface.register(PROBED, attend_packed)  # pyright: ignore[reportArgumentType]
AttentionMaskInterface.register(PROBED, _window_of_mask)  # pyright: ignore[reportArgumentType]
