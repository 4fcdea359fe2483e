"""Every error that a caller can meet, in one place. The same class reaches the caller whatever the transport.

Each class's docstring is the advice that ends its message; the message itself names the field and the value.
"""

from typing import ClassVar, Literal, TypeAlias

import msgspec

Category: TypeAlias = Literal["user", "server"]

_MOST_CHARACTERS = 2000
"""Of what was found: it may be as long as what a client sent, and an error must fit into a header."""


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it travels. `after_s`: what was asked for may be asked for again after so many seconds."""

    code: str
    message: str
    field: str | None = None
    after_s: float | None = None


class LorryError(Exception):
    """Something went wrong in Lorry."""

    category: ClassVar[Category] = "server"

    def __init__(self, problem: str, *, field: str | None = None, after_s: float | None = None) -> None:
        """`problem` says what was found, with the value; `field` names where, as the caller wrote it; `after_s` is for
        what may be asked for again."""
        advice = " ".join((type(self).__doc__ or "").split())
        if not problem.endswith(advice):
            shown = problem if len(problem) <= _MOST_CHARACTERS else f"{problem[:_MOST_CHARACTERS]}…"
            problem = f"{shown}. {advice}"
        super().__init__(problem)
        self.field, self.after_s = field, after_s

    @property
    def info(self) -> ErrorInfo:
        return ErrorInfo(type(self).__name__, str(self), self.field, self.after_s)


class AuthenticationError(LorryError):
    """Pass a key that `lorry keys create --tenant NAME` printed."""

    category = "user"


class PermissionDeniedError(LorryError, PermissionError):
    """This request changed nothing. `lorry keys create --scope` makes a key that may more."""

    category = "user"


class LimitReachedError(LorryError):
    """This request changed nothing. Whoever runs this server sets limits with `lorry limits set`."""

    category = "user"


class InvalidRequestError(LorryError, ValueError):
    """This request changed nothing; correct the value and send it again."""

    category = "user"

    @classmethod
    def of(cls, field: str, value: object, expected: str) -> "InvalidRequestError":
        shown = repr(value)
        return cls(f"{field} is {shown if len(shown) <= 80 else shown[:77] + '...'}, expected {expected}", field=field)


class UnknownModelError(LorryError, LookupError):
    """Ask `get_server_capabilities` which models are served; names are case-sensitive."""

    category = "user"


class UnsupportedModelError(LorryError):
    """Serve a decoder that transformers loads from a local folder or a hub id, with causal attention."""

    category = "user"


class NotFoundError(LorryError, LookupError):
    """It does not exist, has expired, or belongs to another tenant."""

    category = "user"


class SeqConflictError(LorryError):
    """This request changed nothing. A number names one request of a run: is another client driving the same run?"""

    category = "user"


class TooManyWaitingError(LorryError):
    """This request changed nothing; send it again after a while, as Lorry's client and the SDK do by themselves."""


class TooManyTriesError(LorryError):
    """Check the key, and come again after a while; a key that was right lately is let in at any time."""

    category = "user"


class MessageTooLargeError(LorryError, ValueError):
    """Send less in one request."""

    category = "user"


class ProtocolError(LorryError):
    """The peer speaks another protocol or version; install the same release of Lorry on both sides."""

    category = "user"


class ConnectionLostError(LorryError, ConnectionError):
    """Check that `lorry serve` runs at this address and that its port is reachable."""


class SessionFinishedError(LorryError):
    """Open a new client session."""

    category = "user"


class CommandCancelledError(LorryError):
    """It was cancelled before it took effect."""

    category = "user"


class DeadlineExceededError(LorryError):
    """It was ended before it took effect; the others of its run go on without it."""

    category = "user"


class StreamDivergedError(LorryError):
    """What was streamed before stands apart from it; await the whole result, or sample again."""


class NonFiniteError(LorryError, ArithmeticError):
    """Weights and moments are as they were before this command. A forward_backward that is not finite adds nothing to
    the pending gradient, and an optim_step that is not finite drops it."""

    category = "user"


class OutOfMemoryError(LorryError, MemoryError):
    """This request changed nothing; send fewer or shorter sequences at once, or serve with more memory."""


class ActorLostError(LorryError):
    """What this run had learned since your last save_state is lost; make a new run from that checkpoint."""


class ActorDiedError(ActorLostError):
    """It did not leave in good order: its runs are rebuilt from their newest saved states when their next commands
    come, and `lorry status` shows to which request each is saved."""


class OutcomeUnknownError(LorryError):
    """`lorry status` shows which actors there are, and to which request each run is saved."""


class ActorKilledError(LorryError):
    """This request changed nothing and is not tried again; the others of its run go on without it."""


class CheckpointError(LorryError):
    """Nothing was loaded; load another checkpoint."""


class StorageError(LorryError):
    """Free disk space or mend the folder's permissions, and call again."""


class JournalDamagedError(StorageError):
    """The server's operator can find out more with `lorry doctor`."""


class StorageUnavailableError(StorageError):
    """This request changed nothing; send it again when the server's disk has room."""


class OlderReleaseError(LorryError):
    """Start `lorry serve` of this release there once, which brings the data up to date; or use the release that wrote
    it."""

    category = "user"


class NewerReleaseError(LorryError):
    """Use the release of Lorry that wrote it, or a later one."""

    category = "user"


class InternalError(LorryError):
    """This is a bug in Lorry; the server's log has the details."""


_CLASSES: dict[str, type[LorryError]] = {}


def _register(cls: type[LorryError]) -> None:
    _CLASSES[cls.__name__] = cls
    for child in cls.__subclasses__():
        _register(child)


_register(LorryError)


def revive(info: ErrorInfo) -> LorryError:
    """The exception that `info` was made from; a code of a newer peer becomes a plain LorryError."""
    error = _CLASSES.get(info.code, LorryError)(info.message, field=info.field, after_s=info.after_s)
    error.args = (info.message,)
    return error
