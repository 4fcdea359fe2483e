"""An adapter's factors by the names that PEFT and vLLM have for them in files, or the hosted service: written in one
layout, and read in any. Touches no file.

Of routed experts there are three forms. `modules`: two-dimensional factors for each expert and each of gate, up and
down, which PEFT and vLLM take for Qwen3-MoE and DeepSeek-V3. `parameters`: PEFT's own for weights that are not modules,
experts side by side in one factor, for all others. `tinker`: three-dimensional factors w1 (gate), w3 (up) and w2
(down), where one of a common factor is enough. The first two have each common factor once for every expert.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ...wire.errors import CheckpointError
from ...wire.types import FileLayout
from ..model.adapter import Adapter
from ..model.spec import Target

Factors: TypeAlias = tuple[Tensor, Tensor]
"""A [rank, inputs] and B transposed [rank, outputs]; of routed experts with one dimension more in front."""

_PREFIX = "base_model.model."
OF_MODULES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_OF_TINKER = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
_TINKER_HEAD = f"{_PREFIX}model.unembed_tokens"


def written(adapter: Adapter, layout: FileLayout) -> dict[str, Tensor]:
    """Every factor by its key."""
    tensors: dict[str, Tensor] = {}
    for target in adapter.targets:
        a, b = adapter.module_weights()[target.name]
        if (weight := target.expert_weight) is None:
            key = _TINKER_HEAD if layout == "tinker" and target.group == "unembed" else _PREFIX + target.name
            tensors |= _pair(key, a, b.mT)
        elif layout == "tinker":
            names = named(target, _OF_TINKER)
            for name, piece in zip(names, split(b, len(names), weight.interleaved), strict=True):
                tensors |= _pair(_PREFIX + name, a.clone(), piece.mT)
        elif weight.as_modules:
            names = named(target, OF_MODULES)
            for name, piece in zip(names, split(b, len(names), weight.interleaved), strict=True):
                mixture, _, leaf = name.rpartition(".")
                for i in range(weight.count):
                    tensors |= _pair(f"{_PREFIX}{mixture}.{i}.{leaf}", _of(a, i).clone(), _of(piece, i).mT)
        else:
            each_a, each_b = (factor.expand(weight.count, -1, -1) for factor in (a, b))
            tensors |= _pair(_parameter(target), each_a.flatten(0, 1), each_b.permute(2, 1, 0).flatten(1))
    return tensors


def layout_of(keys: Iterable[str]) -> FileLayout:
    """What a file is written in; "peft" where both layouts have the same keys."""
    ours = (f".{leaf}.lora_A.weight" for leaves in _OF_TINKER.values() for leaf in leaves)
    return "tinker" if any(key.startswith(_TINKER_HEAD) or key.endswith(tuple(ours)) for key in keys) else "peft"


def trains_head(keys: Iterable[str]) -> bool:
    """By the names that output heads have in the families that are known."""
    heads = (_TINKER_HEAD, f"{_PREFIX}lm_head", f"{_PREFIX}embed_out")
    return any(key.startswith(heads) for key in keys)


def read(tensors: dict[str, Tensor], targets: Sequence[Target]) -> dict[str, Factors]:
    """What there is of `targets`, by their names, in whichever layout; `tensors` keeps what belongs to none of them.

    Raises CheckpointError for half of a pair, and for gate and up with an A each.
    """
    factors: dict[str, Factors] = {}
    for target in targets:
        found = _read_linear(tensors, target) if target.expert_weight is None else _read_experts(tensors, target)
        if found is not None:
            factors[target.name] = found
    return factors


def is_shared(factors: Mapping[str, Factors], targets: Sequence[Target]) -> bool:
    """Whether adapters of the shared kind can hold what was read of routed experts."""
    weights = ((factors[t.name], t.expert_weight) for t in targets if t.expert_weight and t.name in factors)
    return all(_are_one(pair[weight.common == "b"]) for pair, weight in weights)


def fit(factor: Tensor, like: Tensor) -> Tensor | None:
    """In the shape of `like`: of routed experts one for all where its copies are one, or a copy for each. None where it
    cannot be."""
    if factor.dim() == like.dim() == 3 and len(factor) != len(like):
        if len(like) > 1 == len(factor):
            factor = factor.expand_as(like)
        elif len(like) == 1 and _are_one(factor):
            factor = factor[:1]
    return factor if factor.shape == like.shape else None


def _pair(key: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}


def _pop(left: dict[str, Tensor], key: str) -> Factors | None:
    """As the file has them: A, and B as it is there."""
    a, b = (left.pop(f"{key}.lora_{letter}.weight", None) for letter in "AB")
    if a is None and b is None:
        return None
    if a is None or b is None:
        raise CheckpointError(f"of {key} there is only lora_{'B' if a is None else 'A'}")
    return a, b


def _read_linear(left: dict[str, Tensor], target: Target) -> Factors | None:
    found = _pop(left, _PREFIX + target.name)
    if found is None and target.group == "unembed":
        found = _pop(left, _TINKER_HEAD)
    return None if found is None else (found[0], found[1].mT)


def _read_experts(left: dict[str, Tensor], target: Target) -> Factors | None:
    assert target.expert_weight is not None
    count, interleaved = target.expert_weight.count, target.expert_weight.interleaved
    if (found := _pop(left, _parameter(target))) is not None:
        a, b = found
        rank = len(a) // count
        if a.shape != (rank * count, target.inputs) or b.shape != (target.outputs, rank * count):
            raise CheckpointError(f"{_parameter(target)} does not fit {count} experts")
        return a.view(count, rank, -1), b.view(-1, rank, count).permute(2, 1, 0)
    pieces = [_pop(left, _PREFIX + name) for name in named(target, _OF_TINKER)]
    if not any(pieces):
        pieces = [_pop_modules(left, target, name) for name in named(target, OF_MODULES)]
    if not any(pieces):
        return None
    known = [piece for piece in pieces if piece is not None]
    if len(known) < len(pieces) or any(not _same(piece[0], known[0][0]) for piece in known):
        raise CheckpointError(f"gate and up of {target.name} are not trained together, with one A for both")
    return known[0][0], _join([b.mT for _, b in known], interleaved)


def _pop_modules(left: dict[str, Tensor], target: Target, name: str) -> Factors | None:
    """[experts, rank, inputs] and [experts, outputs, rank]."""
    mixture, _, leaf = name.rpartition(".")
    found = [_pop(left, f"{_PREFIX}{mixture}.{i}.{leaf}") for i in range(target.experts or 0)]
    known = [pair for pair in found if pair is not None]
    if not known:
        return None
    if len(known) < len(found) or len({(a.shape, b.shape) for a, b in known}) > 1:
        raise CheckpointError(f"{name} is not there in one rank for each of the {target.experts} experts")
    a, b = zip(*known, strict=True)
    return torch.stack(a), torch.stack(b)


def _parameter(target: Target) -> str:
    """PEFT's key: the first weight that it wraps is the base of the second."""
    mixture, _, leaf = target.name.rpartition(".")
    return f"{_PREFIX}{mixture}.base_layer" if leaf == "gate_up_proj" else f"{_PREFIX}{mixture}"


def named(target: Target, leaves: Mapping[str, Sequence[str]]) -> list[str]:
    """What one of the routed experts' weights is called, in one piece or two, in a layout like OF_MODULES."""
    mixture, _, leaf = target.name.rpartition(".")
    return [f"{mixture}.{name}" for name in leaves[leaf]]


def split(b: Tensor, pieces: int, interleaved: bool) -> Sequence[Tensor]:
    """B transposed of gate and up together as one of each."""
    if pieces == 1:
        return [b]
    return [b[..., i::pieces] for i in range(pieces)] if interleaved else b.chunk(pieces, -1)


def _join(pieces: Sequence[Tensor], interleaved: bool) -> Tensor:
    if len(pieces) == 1:
        return pieces[0]
    return torch.stack(list(pieces), -1).flatten(-2) if interleaved else torch.cat(list(pieces), -1)


def _of(factor: Tensor, expert: int) -> Tensor:
    return factor[0 if len(factor) == 1 else expert]


def _are_one(factor: Tensor) -> bool:
    return len(factor) == 1 or bool((factor == factor[:1]).all())


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one, other)
