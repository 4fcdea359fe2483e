"""What became of commands, and when: as the journal has it. All times are Unix seconds."""

from typing import Annotated

import msgspec

from .commands import CommandKind
from .ids import ActorId, FutureId, LaneId
from .types import UsageKind

PAGE = 1000
"""Commands that are told at a time."""


class Place(msgspec.Struct, frozen=True):
    """After which command of which lane a timeline goes on."""

    lane: LaneId
    seq: Annotated[int, msgspec.Meta(ge=-1, lt=2**62)]


class TimedCommand(msgspec.Struct, frozen=True, omit_defaults=True):
    """`run` is the one whose weights a sampler's has, None for those of the bare base model. `started_at` is when it
    was handed out to an actor for the first of `attempts` times: None and 0 while it is not over, where no actor was
    given it, or where an older release finished it. `actor` is the last that had it. `device_s` is its share of the
    device's time, None where that is not known. `error` is the class of what was wrong, None where the result is kept
    no longer.
    """

    future: FutureId
    lane: LaneId
    run: str | None
    base_model: str
    seq: int
    kind: CommandKind
    state: str
    accepted_at: float
    started_at: float | None = None
    finished_at: float | None = None
    attempts: int = 0
    actor: ActorId | None = None
    device_s: float | None = None
    tokens: dict[UsageKind, int] = {}
    error: str | None = None


class FailedCommand(msgspec.Struct, frozen=True):
    """At `at`, in Unix seconds, with the error `code` and its `message`."""

    at: float
    seq: int
    kind: CommandKind
    code: str
    message: str


class Timeline(msgspec.Struct, frozen=True):
    """Some commands of a client session or a run, lane after lane; `after` is where it goes on, None at the end."""

    commands: list[TimedCommand]
    after: Place | None
