"""Which scopes a message takes. Pure; any one of those that are named will do."""

from collections.abc import Mapping
from types import MappingProxyType

from ...wire.admin_messages import Administer
from ...wire.catalogue_messages import (
    AssignProject,
    AuditBetween,
    Completions,
    CopyCheckpoint,
    CountClientEvents,
    CreateClientSession,
    DeleteCheckpoint,
    DeleteCheckpoints,
    ExpireCheckpoint,
    FindRuns,
    FinishClientSession,
    GetMetrics,
    JoinSampler,
    LaneState,
    LendCheckpoint,
    MintToken,
    OwnJobs,
    PublishCheckpoint,
    Query,
    QueueState,
    RevokeKey,
    SessionTimeline,
    SetPriority,
    TouchClientSession,
    UsageBetween,
)
from ...wire.client_messages import (
    Cancel,
    CreateRun,
    CreateSampler,
    FromClient,
    Goodbye,
    Ping,
    Read,
    Refuse,
    Submit,
    Watch,
)
from ...wire.errors import PermissionDeniedError
from ...wire.limits import SCOPES, Scope
from ...wire.metrics import LatestMetrics, LogMetrics, ReadMetrics
from ...wire.news import Follow, Unfollow

_WORK: tuple[Scope, ...] = ("train", "sample")
_PROGRAMS: tuple[Scope, ...] = ("train", "sample", "read", "admin")
"""Whose keys programs have, which need things around their work; who only measures needs none."""
_OPEN_QUESTIONS = ("capabilities", "run", "sampler", "weights", "tenant", "key", "projects", "storage_price")
"""What a program has to ask of what it trains or samples."""

NEEDED: Mapping[type, tuple[Scope, ...]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                CreateRun,
                DeleteCheckpoint,
                DeleteCheckpoints,
                PublishCheckpoint,
                ExpireCheckpoint,
                CopyCheckpoint,
                LogMetrics,
            ),
            ("train",),
        ),
        **dict.fromkeys((CreateSampler, JoinSampler), ("sample",)),
        **dict.fromkeys((Submit, Refuse, Cancel), _WORK),
        **dict.fromkeys((FindRuns, OwnJobs, SessionTimeline, UsageBetween, ReadMetrics, LatestMetrics), ("read",)),
        LendCheckpoint: ("read", "train"),
        **dict.fromkeys((AssignProject, SetPriority), _WORK),
        AuditBetween: ("read", "admin"),
        Query: ("read",),  # but for some
        Administer: ("admin",),
        **dict.fromkeys((Follow, Unfollow), ("read", "admin")),  # what is his own, and the deployment
        **dict.fromkeys((CreateClientSession, TouchClientSession, FinishClientSession, CountClientEvents), _PROGRAMS),
        **dict.fromkeys((MintToken, RevokeKey, LaneState, QueueState, Completions), _PROGRAMS),
        **dict.fromkeys((Watch, Read), _PROGRAMS),
        **dict.fromkeys((Ping, Goodbye), SCOPES),
        GetMetrics: ("admin", "metrics"),
    }
)


def check(scopes: frozenset[Scope], message: FromClient) -> None:
    """Raises PermissionDeniedError. What has to do with a run or a sampler takes more: `check_lane`."""
    match message:
        case Query() if message.what in _OPEN_QUESTIONS:
            _check(scopes, _PROGRAMS, message.what)
        case Query():
            _check(scopes, NEEDED[Query], message.what)
        case Follow() | Unfollow():
            _check(scopes, ("admin",) if message.of == "deployment" else ("read",), message.of)
        case _:
            _check(scopes, NEEDED[type(message)], type(message).__struct_config__.tag)


def check_lane(scopes: frozenset[Scope], what: str, *, of_sampler: bool) -> None:
    """By what it is about, whatever it says that it is. Raises PermissionDeniedError: then a command has no place in
    the order, which others would wait behind."""
    _check(scopes, ("sample",) if of_sampler else ("train",), what)


def _check(scopes: frozenset[Scope], needed: tuple[Scope, ...], what: object) -> None:
    if scopes.isdisjoint(needed):
        problem = f"scope is {', '.join(sorted(scopes))}, expected {' or '.join(needed)} for {what!r}"
        raise PermissionDeniedError(problem, field="scope")
