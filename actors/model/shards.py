"""Which part of each layer a rank has, of a base model that several share. Pure.

As in Megatron (arXiv:1909.08053): heads and the MLP's inner width are divided, so the layers that write them by their
outputs, those that read them by their inputs; the head by its vocabulary; routed experts whole, each to one rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...wire.errors import UnsupportedModelError
from .spec import Axis, Shard, Target

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_OF_HEADS: dict[str, Axis] = {
    "q_proj": "outputs",
    "k_proj": "outputs",
    "v_proj": "outputs",
    "q_b_proj": "outputs",
    "kv_b_proj": "outputs",
    "o_proj": "inputs",
}
_OF_KEYS = frozenset(("k_proj", "v_proj"))
"""Those whose heads may be fewer: neighbouring ranks have the same one then."""
_OF_WIDTH: dict[str, Axis] = {"gate_proj": "outputs", "up_proj": "outputs", "down_proj": "inputs"}
_WHOLE = frozenset(("q_a_proj", "kv_a_proj_with_mqa"))
"""What makes the narrow states that all heads share: every rank has them."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Of attention: how many ask, and how many keys and values they share."""

    queries: int
    keys: int


def heads_of(text: "PreTrainedConfig") -> Heads:
    """Of a decoder's configuration."""
    queries: int = text.num_attention_heads
    return Heads(queries, getattr(text, "num_key_value_heads", None) or queries)


def divided(targets: Sequence[Target], heads: Heads, rank: int, ranks: int) -> tuple[Target, ...]:
    """The targets with what of each is `rank`'s, None where it has all.

    Raises UnsupportedModelError where the model cannot be divided by so many.
    """
    _check_heads(heads, ranks)
    return tuple(replace(target, shard=_shard(target, heads, rank, ranks), ranks=ranks) for target in targets)


def _check_heads(heads: Heads, ranks: int) -> None:
    if heads.queries % ranks:
        raise UnsupportedModelError(
            f"{heads.queries} attention heads cannot be divided among {ranks} devices: "
            f"--tensor-parallel must be a divisor of {heads.queries}"
        )
    if heads.keys % ranks and ranks % heads.keys:
        raise UnsupportedModelError(
            f"{heads.keys} heads of keys and values cannot be divided among {ranks} devices, nor shared by them: "
            f"--tensor-parallel must be a divisor or a multiple of {heads.keys}"
        )


def _shard(target: Target, heads: Heads, rank: int, ranks: int) -> Shard | None:
    if target.expert_weight is not None:
        return Shard("experts", *share(target.expert_weight.count, rank, ranks))
    if target.group == "unembed":
        return Shard("outputs", *share(target.outputs, rank, ranks))
    leaf = target.name.rpartition(".")[2]
    if target.group == "mlp" and (axis := _OF_WIDTH.get(leaf)):
        return Shard(axis, *share(target.outputs if axis == "outputs" else target.inputs, rank, ranks))
    if target.group == "attn" and (axis := _OF_HEADS.get(leaf)):
        size, count = target.outputs if axis == "outputs" else target.inputs, heads.queries
        if leaf in _OF_KEYS:
            count = heads.keys
        start, end = (rank * count // ranks, rank * count // ranks + 1) if count < ranks else share(count, rank, ranks)
        width = size // count
        return Shard(axis, start * width, end * width, is_shared=count < ranks)
    if target.group == "attn" and leaf in _WHOLE:
        return None
    raise UnsupportedModelError(
        f"{target.name} is a layer that is not known to be divided: serve the model without --tensor-parallel"
    )


def share(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and behind last of `count` things in a row: of all ranks' as equal as can be."""
    return rank * count // ranks, (rank + 1) * count // ranks


def own_target(target: Target) -> Target:
    """As this rank's layer is. What several ranks have the same part of stays whole, and is narrowed in use."""
    shard = target.shard
    if shard is None or shard.is_shared:
        return target
    if target.expert_weight is not None:
        count = shard.end - shard.start
        return replace(target, shard=None, expert_weight=replace(target.expert_weight, count=count))
    inputs, outputs = target.own_sizes
    return replace(target, shard=None, inputs=inputs, outputs=outputs)
