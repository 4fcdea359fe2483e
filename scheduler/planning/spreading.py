"""A large command that several actors execute: its data are divided, and what they give is gathered at its run's home.

Pure. Home publishes its weights; any actor computes a part with these and keeps no state of it; home adds the parts'
gradients to its own in one go, which is when the command takes effect. So a part that is lost is computed again, and a
command that cannot be spread to its end has changed nothing, and home executes it whole.
"""

from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING, Literal

from ...wire.ids import FutureId

if TYPE_CHECKING:
    from .lanes import Command

Stage = Literal["publish", "part", "gather"]


@dataclass(frozen=True, slots=True)
class Share:
    """What one actor does of `whole`. `spread` is unique; those of the same `weights` compute with the same ones."""

    stage: Stage
    whole: "Command"
    spread: int
    weights: int
    index: int
    parts: int


@dataclass(slots=True)
class Spread:
    """A run's command under way on several actors. `left` are the parts that are not over; then home gathers them.
    So many tokens were `charged` for those that are."""

    id: int
    whole: "Command"
    weights: int
    parts: int
    left: set[int] = field(default_factory=set[int])
    is_gathering: bool = False
    charged: int = 0

    def __post_init__(self) -> None:
        self.left = set(range(self.parts))

    def publishing(self) -> "Command":
        return self._share("publish", f"{self.whole.future}/weights", cost=1)

    def all_parts(self) -> "list[Command]":
        cost = ceil(self.whole.cost / self.parts)
        return [self._share("part", f"{self.whole.future}/{self.id}-{i}", cost, i) for i in range(self.parts)]

    def due(self) -> "Command | None":
        """What home is to do next. It gathers under the command's own name: that it ends is the command's end."""
        return None if self.left or self.is_gathering else self._share("gather", self.whole.future, cost=1)

    def _share(self, stage: Stage, future: str, cost: int, index: int = 0) -> "Command":
        share = Share(stage, self.whole, self.id, self.weights, index, self.parts)
        return replace(self.whole, future=FutureId(future), cost=cost, share=share)


def parts_for(alone_s: float, spread_after_s: float, free: int) -> int:
    """Among how many actors to divide what would take one of them `alone_s`, of which `free` have nothing to train:
    each is to have that limit's worth of it at the most, if they are enough."""
    return max(1, min(free, ceil(alone_s / spread_after_s)))
