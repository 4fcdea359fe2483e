"""A base model becomes one rank's part of it: the first rank reads it whole, and every rank keeps what is its own.

Nothing here is guessed: a layer that is not known to be divided is refused, and what the ranks compute together is
compared with what the whole model did.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...wire.errors import UnsupportedModelError
from ..model.base_model import BaseModel
from ..model.leading import Division, Lead
from ..model.lora import LoraTargets, experts_of, head_of, layers_of
from ..model.ranks import Ranks, sum_block
from ..model.shards import divided, heads_of, share
from ..model.spec import Shard, Target
from ..model.targets import EYES, block_of
from .messages import TensorFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPARED_TOKENS = 8
_PER_HEAD = frozenset(("sinks",))
"""Parameters of attention that have a number for each head."""


def check_divisible(base: BaseModel, targets: LoraTargets, ranks: int) -> None:
    """Raises UnsupportedModelError where the model cannot be divided among so many."""
    name = type(base.model).__name__
    if targets.frozen_experts:
        raise UnsupportedModelError(
            f"{name} has {targets.frozen_experts} for experts, which are not known to be divided: "
            "serve the model without --tensor-parallel"
        )
    for rank in range(ranks):
        divided(targets.modules, heads_of(base.model.config.get_text_config()), rank, ranks)


def tensors_of(model: "PreTrainedModel") -> list[tuple[TensorFacts, Tensor]]:
    """In model order: parameters, buffers, and tensors that modules merely hold; but not those of eyes."""
    found: dict[int, tuple[TensorFacts, Tensor]] = {}
    for path, module in model.named_modules():
        if EYES.intersection(path.split(".")):
            continue
        for leaf, tensor in _own_tensors(module):
            name = f"{path}.{leaf}" if path else leaf
            if id(tensor) in found:
                found[id(tensor)][0].names.append(name)
            else:
                facts = TensorFacts([name], list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
                found[id(tensor)] = facts, tensor
    return list(found.values())


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for held in (module._parameters, module._buffers, vars(module)):  # pyright: ignore[reportPrivateUsage]
        for leaf, value in held.items():
            if isinstance(value, Tensor):
                yield leaf, value


def take_share(
    base: BaseModel, targets: LoraTargets, ranks: Ranks, lead: Lead | None, tensors: list[TensorFacts]
) -> tuple[BaseModel, LoraTargets]:
    """On every rank, together: `base` becomes this one's part, in place. On the first it has the weights, and loses
    them one by one; on the others it is an outline."""
    modules = divided(targets.modules, heads_of(base.model.config.get_text_config()), ranks.rank, ranks.size)
    cuts = _cuts(base, modules, ranks)
    whole = {facts.names[0]: tensor for facts, tensor in tensors_of(base.model)} if ranks.rank == 0 else {}
    for facts in tensors:
        _take(base.model, facts, whole.pop(facts.names[0], None), cuts, ranks)
    for target in modules:
        if target.shard is not None:
            _resize(base, target, target.shard)
    for block in {block_of(target.name) for target in modules if target.shard and target.group != "unembed"}:
        sum_block(base.model.get_submodule(block), ranks)
    if ranks.rank == 0:
        base.model.to(ranks.device)  # pyright: ignore[reportArgumentType]  # eyes, which are nobody else's
    head = next(target for target in modules if target.index == head_of(base).index)
    ends = [share(head.outputs, rank, ranks.size) for rank in range(ranks.size)]
    division = Division(ranks, tuple(end - start for start, end in ends), lead)
    return replace(base, device=ranks.device, division=division), replace(targets, modules=modules)


def outline_of_rank(base: BaseModel, targets: LoraTargets, ranks: int) -> tuple[BaseModel, LoraTargets]:
    """Of an outline, in place, what the rank with most of it would have; which nobody shares it with."""

    def nobody(_: int) -> None:
        raise AssertionError("an outline computes nothing")

    last = Ranks(ranks - 1, ranks, base.device, nobody)
    return take_share(base, targets, last, None, [facts for facts, _ in tensors_of(base.model)])


@dataclass(frozen=True, slots=True)
class _Cut:
    dim: int
    start: int
    end: int


def _cuts(base: BaseModel, modules: Sequence[Target], ranks: Ranks) -> dict[str, _Cut | None]:
    """By the names of tensors, of which this rank has a part, or None: nothing at all."""
    cuts: dict[str, _Cut | None] = {}
    for target in modules:
        shard, name = target.shard, target.name
        if shard is None:
            continue
        if shard.axis == "experts":
            cuts |= dict.fromkeys((name, f"{name}_bias"), _Cut(0, shard.start, shard.end))
            continue
        cut = _Cut(0 if shard.axis == "outputs" else 1, shard.start, shard.end)
        cuts[f"{name}.base.weight"] = cut
        if shard.axis == "outputs":
            cuts |= dict.fromkeys((f"{name}.base.bias", f"{name}.bias"), cut)
        elif ranks.rank > 0:  # it counts once in the sum
            cuts |= dict.fromkeys((f"{name}.base.bias", f"{name}.bias"), None)
    of_heads = _Cut(0, *share(heads_of(base.model.config.get_text_config()).queries, ranks.rank, ranks.size))
    for block in {block_of(target.name) for target in modules if target.group == "attn"}:
        cuts |= {f"{block}.{leaf}": of_heads for leaf in _PER_HEAD}
    return cuts


def _take(
    model: "PreTrainedModel", facts: TensorFacts, whole: Tensor | None, cuts: dict[str, _Cut | None], ranks: Ranks
) -> None:
    """From the first rank, which has the `whole`."""
    with torch.no_grad():
        if whole is None:
            tensor = torch.empty(facts.shape, dtype=getattr(torch, facts.dtype), device=ranks.device)
        else:
            tensor = whole.detach().to(ranks.device).contiguous()
        if not tensor.is_meta:
            ranks.from_first(tensor)
    is_kept_whole = any(name not in cuts for name in facts.names)
    for name in facts.names:
        piece: Tensor | None = tensor
        if name in cuts:
            cut = cuts[name]
            piece = None if cut is None else tensor.narrow(cut.dim, cut.start, cut.end - cut.start)
            if piece is not None and not is_kept_whole:
                piece = piece.clone(memory_format=torch.contiguous_format)
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        if piece is not None and leaf in module._parameters:
            piece = nn.Parameter(piece, requires_grad=False)
        setattr(module, leaf, piece)


def _resize(base: BaseModel, target: Target, shard: Shard) -> None:
    if shard.axis == "experts":
        if (experts := experts_of(base).get(target.index)) is not None:
            experts.keep_own(shard.start, shard.end)
        return
    layer = layers_of(base)[target.index]
    layer.base.in_features, layer.base.out_features = layer.in_features, layer.out_features = target.own_sizes
