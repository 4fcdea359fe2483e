"""How a command's error reads to whoever sent it. Pure.

The Tinker SDK sends a large forward_backward in several requests, and shows the error of one: an index in it counts in
that request alone, and what the others added to the gradient is there.
"""

from ..storage.rows import CommandRow
from ..wire.commands import CommandKind
from ..wire.errors import ActorKilledError, ActorLostError, CommandCancelledError, ErrorInfo, NotFoundError

_SENT_IN_PARTS: frozenset[CommandKind] = frozenset(("forward", "forward_backward"))
_SAY_ALL = frozenset(
    error.__name__ for error in (ActorKilledError, ActorLostError, CommandCancelledError, NotFoundError)
)
"""What these say of the run is all that there is to say."""
_STANDS = (
    "Gradients of other requests, and a large call is sent in several, stand until the next optim_step: send what is"
    " in this one again, not what was in those."
)


def told(row: CommandRow, error: ErrorInfo) -> ErrorInfo:
    """`error` with the request that it is about, where the sender may not know which that is."""
    if row.kind not in _SENT_IN_PARTS:
        return error
    message = f"In request {row.seq} of this run: {error.message}"
    if row.kind == "forward_backward" and error.code not in _SAY_ALL:
        message = f"{message} {_STANDS}"
    return ErrorInfo(error.code, message, error.field)
