"""What can be read of a client's message that is wrong: enough to answer it, and to end its place in a run's order."""

from typing import Literal

import msgspec

from ..wire.client_messages import Refuse
from ..wire.codec import MAX_HEADER_BYTES, decode
from ..wire.commands import CommandKind
from ..wire.errors import LorryError
from ..wire.ids import LaneId


class _Numbered(msgspec.Struct, frozen=True):
    request: int


class _Placed(msgspec.Struct, frozen=True):
    type: Literal["submit", "refuse"]
    request: int
    lane: LaneId
    seq: int
    kind: CommandKind


def number_of(header: bytes) -> int | None:
    """The request's, where it has one."""
    try:
        return decode(header, _Numbered, MAX_HEADER_BYTES).request
    except LorryError:
        return None


def refusal_of(header: bytes, error: LorryError) -> Refuse | None:
    """The refusal of a command, where it says which place it has."""
    try:
        placed = decode(header, _Placed, MAX_HEADER_BYTES)
    except LorryError:
        return None
    return Refuse(placed.request, placed.lane, placed.seq, placed.kind, error.info)
