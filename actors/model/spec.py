"""What adapters may train of a base model, and what an adapter is before it learns anything. Pure."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ...wire.types import ExpertLora

Group: TypeAlias = Literal["attn", "mlp", "unembed"]
Factor: TypeAlias = Literal["a", "b"]
Axis: TypeAlias = Literal["inputs", "outputs", "experts"]


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """Of a layer's `count` routed experts, either what gate and up read or what down writes.

    `common` is the factor that an adapter whose expert LoRA is `shared` has once for them all: A of what they read,
    which is one hidden state, and B of what they write, whose sum is one again. `interleaved`: gate and up alternate in
    the base's weight, which `transposed` has [inputs, outputs]. `as_modules`: PEFT has a layer for each expert in this
    family's files, not one weight for all.
    """

    count: int
    common: Factor
    interleaved: bool = False
    as_modules: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """Of a layer that several devices share, what one of them has: from `start` to `end` along `axis`. `is_shared`:
    others have some of the same."""

    axis: Axis
    start: int
    end: int
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer of the base model that adapters may train, or one weight of a layer's routed experts; `index` is
    its place in model order. The sizes are the whole layer's, also where this process, one of `ranks`, has a `shard`
    of it."""

    index: int
    name: str
    inputs: int
    outputs: int
    group: Group
    expert_weight: ExpertWeight | None = None
    shard: Shard | None = None
    ranks: int = 1

    @property
    def most_outputs(self) -> int:
        """Of the layer's outputs, as many as the device with most of them has."""
        if self.shard is None or self.shard.axis != "outputs":
            return self.outputs
        return max(-(-self.outputs // self.ranks), self.shard.end - self.shard.start)

    @property
    def own_sizes(self) -> tuple[int, int]:
        """Inputs and outputs that this process computes with."""
        size = {"inputs": self.inputs, "outputs": self.outputs}
        if self.shard is not None and self.shard.axis != "experts":
            size[self.shard.axis] = self.shard.end - self.shard.start
        return size["inputs"], size["outputs"]

    @property
    def experts(self) -> int | None:
        return None if self.expert_weight is None else self.expert_weight.count


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What an adapter is before it learns anything. Scale alpha / rank, alpha 32: 'LoRA Without Regret'."""

    rank: int
    alpha: float = 32.0
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    expert_lora: ExpertLora = "shared"
    target_modules: tuple[str, ...] | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def groups(self) -> frozenset[Group]:
        chosen: dict[Group, bool] = {"attn": self.train_attn, "mlp": self.train_mlp, "unembed": self.train_unembed}
        return frozenset(group for group, train in chosen.items() if train)

    def takes(self, name: str) -> bool:
        """Whether it trains a layer of that name, if it trains its group. Names match as PEFT matches them."""
        return self.target_modules is None or any(is_called(name, end) for end in self.target_modules)


def is_called(name: str, end: str) -> bool:
    """Whether a layer's whole name, or what is behind one of its dots, is `end`."""
    return name == end or name.endswith(f".{end}")


def shapes_of(spec: AdapterSpec, target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A and of B transposed."""
    a, b = (spec.rank, target.inputs), (spec.rank, target.outputs)
    if target.expert_weight is None:
        return a, b
    count, common = target.expert_weight.count, target.expert_weight.common if spec.expert_lora == "shared" else None
    return (1 if common == "a" else count, *a), (1 if common == "b" else count, *b)
