"""Which scopes a message takes. Pure; any one of those that are named will do."""

from collections.abc import Mapping
from types import MappingProxyType

from ..wire.admin_messages import Administer
from ..wire.catalogue_messages import (
    Completions,
    CopyCheckpoint,
    CountClientEvents,
    CreateClientSession,
    DeleteCheckpoint,
    ExpireCheckpoint,
    FinishClientSession,
    JoinSampler,
    LaneState,
    MintToken,
    PublishCheckpoint,
    Query,
    QueueState,
    RevokeKey,
    TouchClientSession,
    UsageBetween,
)
from ..wire.client_messages import (
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
from ..wire.commands import SAMPLING_KINDS
from ..wire.errors import PermissionDeniedError
from ..wire.types import SCOPES, Scope

_WORK: tuple[Scope, ...] = ("train", "sample")
_OPEN_QUESTIONS = ("capabilities", "run", "sampler", "weights", "tenant", "key")
"""What a program has to ask of what it trains or samples."""

NEEDED: Mapping[type, tuple[Scope, ...]] = MappingProxyType(
    {
        **dict.fromkeys((CreateRun, DeleteCheckpoint, PublishCheckpoint, ExpireCheckpoint, CopyCheckpoint), ("train",)),
        **dict.fromkeys((CreateSampler, JoinSampler), ("sample",)),
        **dict.fromkeys((Submit, Refuse, Cancel), _WORK),  # more by its kind
        UsageBetween: ("read",),
        Query: ("read",),  # but for some
        Administer: ("admin",),
        **dict.fromkeys((CreateClientSession, TouchClientSession, FinishClientSession, CountClientEvents), SCOPES),
        **dict.fromkeys((MintToken, RevokeKey, LaneState, QueueState, Completions), SCOPES),
        **dict.fromkeys((Watch, Read, Ping, Goodbye), SCOPES),
    }
)


def check(scopes: frozenset[Scope], message: FromClient) -> None:
    """Raises PermissionDeniedError: then not even a command has a place in its run's order."""
    match message:
        case Submit() | Refuse():
            _check(scopes, ("sample",) if message.kind in SAMPLING_KINDS else ("train",), message.kind)
        case Query() if message.what in _OPEN_QUESTIONS:
            pass
        case Query():
            _check(scopes, NEEDED[Query], message.what)
        case _:
            _check(scopes, NEEDED[type(message)], type(message).__struct_config__.tag)


def check_cancel(scopes: frozenset[Scope], *, of_sampler: bool) -> None:
    """Raises PermissionDeniedError."""
    _check(scopes, ("sample",) if of_sampler else ("train",), "cancel")


def _check(scopes: frozenset[Scope], needed: tuple[Scope, ...], what: object) -> None:
    if scopes.isdisjoint(needed):
        problem = f"scope is {', '.join(sorted(scopes))}, expected {' or '.join(needed)} for {what!r}"
        raise PermissionDeniedError(problem, field="scope")
