"""What the planner knows of each base model's actors and of what waits for them."""

from collections import deque
from dataclasses import dataclass, field

from ...wire.actor_messages import Capacity
from ...wire.ids import ActorId, BatchId, LaneId, TenantId
from .fairness import Shares
from .lanes import Command


@dataclass(slots=True)
class Actor:
    """`tokens_per_s` is what it has trained lately, None while nobody knows."""

    id: ActorId
    base_model: str
    capacity: Capacity
    train_batches: dict[BatchId, int] = field(default_factory=dict[BatchId, int])
    sample_rows: int = 0
    homed: set[LaneId] = field(default_factory=set[LaneId])
    is_leaving: bool = False
    tokens_per_s: float | None = None

    @property
    def room(self) -> int:
        """Tokens to train that it takes now."""
        return self.capacity.credits * self.capacity.token_budget - sum(self.train_batches.values())


@dataclass(slots=True)
class Pool:
    """Everything of one base model. `ready` holds lanes with a head, in the order in which they became ready; `parts`
    are those of commands that several actors execute, in any of which they may run."""

    shares: Shares = field(default_factory=Shares)
    actors: dict[ActorId, Actor] = field(default_factory=dict[ActorId, Actor])
    ready: dict[LaneId, None] = field(default_factory=dict[LaneId, None])
    samples: dict[TenantId, deque[Command]] = field(default_factory=dict[TenantId, deque[Command]])
    parts: deque[Command] = field(default_factory=deque[Command])

    @property
    def staying(self) -> list[Actor]:
        return [actor for actor in self.actors.values() if not actor.is_leaving]
