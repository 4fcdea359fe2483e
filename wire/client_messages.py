"""What a client and the broker say to each other. Headers only: a payload, where there is one, is the next frame.

A request carries a number of the client's choosing, and its answer carries the same. A resent request is harmless:
runs and samplers are made once for each nonce, commands once for each (lane, seq).
"""

from typing import Literal, TypeAlias

import msgspec

from .commands import CommandKind
from .errors import ErrorInfo
from .ids import FutureId, LaneId, SessionId
from .types import LoraConfig

VERSION = 1


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First on every connection, and again whenever the broker answers `Unknown`."""

    version: int
    api_key: str
    client: str


class CreateRun(msgspec.Struct, frozen=True, tag="create_run"):
    request: int
    nonce: str
    base_model: str
    lora: LoraConfig
    user_metadata: dict[str, str] = {}


class CreateSampler(msgspec.Struct, frozen=True, tag="create_sampler"):
    """Of a base model, or of saved weights: exactly one of `base_model` and `model_path`."""

    request: int
    nonce: str
    base_model: str | None = None
    model_path: str | None = None


class CommandArguments(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of a command that the broker acts on. `name` is a new checkpoint's, `path` an existing one's."""

    name: str | None = None
    path: str | None = None
    ttl_seconds: int | None = None
    optimizer: bool = False


class Submit(msgspec.Struct, frozen=True, tag="submit", omit_defaults=True):
    """`tokens` and `rows` are the client's estimate, for planning; what is billed is what the actor counts."""

    request: int
    lane: LaneId
    seq: int
    kind: CommandKind
    tokens: int = 0
    rows: int = 0
    arguments: CommandArguments = CommandArguments()


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Tell this connection when these futures resolve; sent again after a reconnect."""

    futures: list[FutureId]


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    request: int
    future: FutureId


class Query(msgspec.Struct, frozen=True, tag="query"):
    request: int
    what: Literal["capabilities", "run", "sampler", "runs", "checkpoints", "usage"]
    subject: str | None = None


class DeleteCheckpoint(msgspec.Struct, frozen=True, tag="delete_checkpoint"):
    request: int
    path: str


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    pass


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    pass


FromClient: TypeAlias = (
    Hello | CreateRun | CreateSampler | Submit | Watch | Cancel | Query | DeleteCheckpoint | Ping | Goodbye
)


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    session: SessionId
    heartbeat_s: float
    max_payload_bytes: int


class Unknown(msgspec.Struct, frozen=True, tag="unknown"):
    """The broker does not know this connection (it restarted, or the session expired): say hello again."""


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """Done, and durable. The payload's type follows from the request."""

    request: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """`request` None: the hello itself, or a message whose number could not be read."""

    request: int | None
    error: ErrorInfo


class Resolved(msgspec.Struct, frozen=True, tag="resolved"):
    """A future's result is in the payload, or `error` says why there is none."""

    future: FutureId
    error: ErrorInfo | None = None


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    pass


ToClient: TypeAlias = Welcome | Unknown | Answer | Failed | Resolved | Pong


class RunCreated(msgspec.Struct, frozen=True):
    run: str


class SamplerCreated(msgspec.Struct, frozen=True):
    sampler: str
    base_model: str


class SamplerInfo(msgspec.Struct, frozen=True):
    sampler: str
    base_model: str
    tokenizer_id: str
