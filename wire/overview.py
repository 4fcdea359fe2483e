"""What goes on at this moment, as the broker's memory has it. Asked of it by operators, administrators and tenants."""

from typing import Annotated, Literal, TypeAlias

import msgspec

from .commands import CommandKind
from .ids import ActorId, FutureId, LaneId, ProjectId, TenantId
from .types import UsageKind

JobState: TypeAlias = Literal["active", "paused_rate_limit", "paused_capacity"]
JOBS_AT_MOST = 200
"""Why one waits takes the broker up to a millisecond to find where a thousand runs have something waiting."""
JobLimit: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=JOBS_AT_MOST)]


class JobsWanted(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is None is any. `run` is a run, with the samplers of its weights, or a sampler. The `limit` oldest are told,
    or the newest."""

    tenant: TenantId | None = None
    run: str | None = None
    base_model: str | None = None
    kind: CommandKind | None = None
    limit: JobLimit = 50
    newest: bool = False


class Job(msgspec.Struct, frozen=True):
    """A command that was accepted, at `accepted_at` in Unix seconds, and is not over. `run` is the one whose weights a
    sampler's has, None for those of the bare base model. `tokens` are as its client said. `state` and `reason` are why
    it is not over."""

    future: FutureId
    tenant: TenantId
    project: ProjectId
    lane: LaneId
    run: str | None
    base_model: str
    kind: CommandKind
    tokens: int
    accepted_at: float
    state: JobState
    reason: str


class Jobs(msgspec.Struct, frozen=True):
    """Those of `total` that were asked for, the oldest first, or the newest. `at` is in Unix seconds of who tells.
    Where no broker serves, `is_served` is false, and they are what the journal holds."""

    at: float
    total: int
    jobs: list[Job]
    is_served: bool = True


class ActorLoad(msgspec.Struct, frozen=True):
    """An actor that is there. `runs` have their state with it; of what it was given and has not ended there are
    `tokens` to train and `sequences` to sample. `train_s` and `sample_s` are the time that it has computed until
    `measured_at`; times are Unix seconds, None before it was first heard. `slots_used` of its slots hold an adapter;
    `memory_bytes` are the device's that its tensors take, or on a CPU the process's."""

    actor: ActorId
    base_model: str
    device: str
    dtype: str
    started_at: float
    is_leaving: bool
    runs: int
    tokens: int
    sequences: int
    train_s: float = 0.0
    sample_s: float = 0.0
    swaps: int = 0
    measured_at: float | None = None
    slots: int = 0
    slots_used: int = 0
    memory_bytes: int = 0


class QueueLoad(msgspec.Struct, frozen=True):
    """What of a tenant is not over, of one model and kind."""

    tenant: TenantId
    base_model: str
    kind: CommandKind
    commands: int
    tokens: int


class Overview(msgspec.Struct, frozen=True):
    """`counted_since` the broker started, in Unix seconds, as `at` is: `tokens` by kind of usage. `queues` are the
    longest by tokens, of `commands` and `queued_tokens` in all. `loading` are models that nobody has loaded yet.
    `trouble` is why nothing can be written, None while all is well."""

    at: float
    counted_since: float
    actors: list[ActorLoad]
    loading: list[str]
    commands: int
    queued_tokens: int
    queues: list[QueueLoad]
    tokens: dict[UsageKind, int]
    oldest: list[Job]
    trouble: str | None = None
