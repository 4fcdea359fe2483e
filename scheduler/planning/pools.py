"""What the planner knows of each base model's actors and of what waits for them."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ...wire.actor_messages import Capacity
from ...wire.ids import ActorId, BatchId, LaneId, TenantId
from .fairness import Shares
from .lanes import Command
from .prefixes import Prefixes
from .queue import Queue


@dataclass(slots=True)
class Actor:
    """`tokens_per_s` is what it has trained lately, None while nobody knows. Actors of one `device` share it. It
    `finds_nothing` of what waits that it could take, as it was when it was asked last."""

    id: ActorId
    base_model: str
    capacity: Capacity
    train_batches: dict[BatchId, int] = field(default_factory=dict[BatchId, int])
    sample_rows: int = 0
    homed: set[LaneId] = field(default_factory=set[LaneId])
    is_leaving: bool = False
    tokens_per_s: float | None = None
    device: str = ""
    finds_nothing: bool = False

    @property
    def is_working(self) -> bool:
        return bool(self.train_batches) or self.sample_rows > 0

    @property
    def room(self) -> int:
        """Tokens to train that it takes now."""
        return self.capacity.credits * self.capacity.token_budget - sum(self.train_batches.values())


class Load(NamedTuple):
    """Of an actor: runs at home there, and tokens to train and sequences to sample that it has not ended."""

    runs: int
    tokens: int
    sequences: int
    is_leaving: bool


class Held(NamedTuple):
    """A command that an actor has: of which batch, and how many actors had died of it when it was handed out."""

    command: Command
    actor: Actor
    batch: BatchId
    deaths: int


class Run(NamedTuple):
    """What waits of one: tokens and requests."""

    tokens: int
    requests: int
    priority: int


class Waiting(NamedTuple):
    """What waits of one base model: each tenant's runs, and tokens of its samples. And what actors have of it, in
    tokens."""

    runs: dict[TenantId, dict[LaneId, Run]]
    samples: dict[TenantId, int]
    in_training: int
    in_sampling: int


class Before(NamedTuple):
    """Of the same run or, of samples, of the same tenant, before one that waits. `priority` is None for a sample."""

    requests: int
    tokens: float
    priority: int | None


@dataclass(slots=True)
class Pool:
    """Everything of one base model. `ready` holds lanes with a head, in the order in which they became ready; `parts`
    are those of commands that several actors execute, in any of which they may run."""

    shares: Shares = field(default_factory=Shares)
    actors: dict[ActorId, Actor] = field(default_factory=dict[ActorId, Actor])
    ready: dict[LaneId, None] = field(default_factory=dict[LaneId, None])
    samples: dict[TenantId, Queue] = field(default_factory=dict[TenantId, Queue])
    parts: deque[Command] = field(default_factory=deque[Command])
    prefixes: Prefixes = field(default_factory=Prefixes)

    def sampler_for(self, command: Command) -> Actor | None:
        """Of the actors that have room: the one that is least full and knows most of the prompt. To be full, and to
        know nothing of it, weigh the same; of equals, who has nothing to train. None where nobody has room."""

        def weight(actor: Actor) -> tuple[float, bool]:
            unknown = 1.0 - self.prefixes.known(command.prefix, actor.id)
            return actor.sample_rows / actor.capacity.sample_rows + unknown, bool(actor.train_batches)

        able = [actor for actor in self.staying if actor.sample_rows < actor.capacity.sample_rows]
        return able[0] if len(able) == 1 else min(able, key=weight, default=None)

    @property
    def waits(self) -> bool:
        """Whether something could be handed out."""
        return bool(self.ready) or bool(self.parts) or any(self.samples.values())

    @property
    def staying(self) -> list[Actor]:
        return [actor for actor in self.actors.values() if not actor.is_leaving]
