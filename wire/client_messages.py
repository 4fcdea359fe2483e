"""What a client and the broker say to each other. Headers only: a payload, where there is one, is the next frame.

A request carries a number of the client's choosing, and its answer carries the same. A resent request is harmless:
runs and samplers are made once for each nonce, commands once for each (lane, seq).
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

from .commands import CommandKind
from .errors import ErrorInfo
from .ids import FutureId, LaneId, SessionId
from .types import LoraConfig

VERSION = 2

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
"""What the database can hold and add up."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First on every connection, and again whenever the broker answers `Unknown`."""

    version: int
    api_key: str
    client: str


class Slot(msgspec.Struct, frozen=True):
    """A numbered place in a client session. It names what is made there, so that making it twice makes it once."""

    session: str
    number: int


class CreateRun(msgspec.Struct, frozen=True, tag="create_run"):
    """`first_seq` is the seq of the run's first command: some clients count from 1."""

    request: int
    nonce: str
    base_model: str
    lora: LoraConfig
    user_metadata: dict[str, str] = {}
    slot: Slot | None = None
    first_seq: Count = 0


class CreateSampler(msgspec.Struct, frozen=True, tag="create_sampler"):
    """Of a base model, or of saved weights: exactly one of `base_model` and `model_path`."""

    request: int
    nonce: str
    base_model: str | None = None
    model_path: str | None = None
    slot: Slot | None = None


class JoinSampler(msgspec.Struct, frozen=True, tag="join_sampler"):
    """One more client of a sampler; the answer is its number, which no other of them has. The first is 0."""

    request: int
    sampler: str


class CommandArguments(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of a command that the broker acts on. `name` is a new checkpoint's, `path` an existing one's, which
    means what it means when the command is accepted.

    `sampler_slot` asks save_weights_for_sampler for weights without a name, and a sampler of them in that place of the
    run's client session; `external` for weights that are there to be downloaded.
    """

    name: str | None = None
    path: str | None = None
    ttl_seconds: int | None = None
    optimizer: bool = False
    overwrite: bool = True
    external: bool = False
    sampler_slot: int | None = None
    user_metadata: dict[str, str] = {}


class Submit(msgspec.Struct, frozen=True, tag="submit", omit_defaults=True):
    """`tokens` and `rows` are the client's estimate, for planning; what is billed is what the actor counts."""

    request: int
    lane: LaneId
    seq: int
    kind: CommandKind
    tokens: Count = 0
    rows: Count = 0
    arguments: CommandArguments = CommandArguments()


class Refuse(msgspec.Struct, frozen=True, tag="refuse"):
    """A command that whoever sends this will not pass on: it fails with `error`, under its seq, and the run goes on.

    Answered as a `Submit` is; the future of that seq is the failure.
    """

    request: int
    lane: LaneId
    seq: int
    kind: CommandKind
    error: ErrorInfo


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Tell this connection when these futures resolve; sent again after a reconnect."""

    futures: list[FutureId]


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    request: int
    future: FutureId


class Query(msgspec.Struct, frozen=True, tag="query"):
    request: int
    what: Literal["capabilities", "run", "sampler", "runs", "checkpoints", "usage", "sessions", "weights", "tenant"]
    subject: str | None = None


class DeleteCheckpoint(msgspec.Struct, frozen=True, tag="delete_checkpoint"):
    request: int
    path: str


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    pass


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """How many models are ready: the one question that needs no key, and the answer names none."""

    request: int


class CreateClientSession(msgspec.Struct, frozen=True, tag="create_client_session"):
    """A client session outlives connections: it is what a user's program has while it runs."""

    request: int
    client: str
    tags: list[str] = []
    user_metadata: dict[str, str] = {}
    display_name: str | None = None


class TouchClientSession(msgspec.Struct, frozen=True, tag="touch_client_session"):
    request: int
    session: str


class FinishClientSession(msgspec.Struct, frozen=True, tag="finish_client_session"):
    request: int
    session: str
    reason: Literal["success", "errored", "interrupted"]
    detail: str | None = None


class PublishCheckpoint(msgspec.Struct, frozen=True, tag="publish_checkpoint"):
    """A public checkpoint can be loaded, sampled, copied and downloaded by every tenant who knows its path."""

    request: int
    path: str
    public: bool


class ExpireCheckpoint(msgspec.Struct, frozen=True, tag="expire_checkpoint"):
    """`ttl_seconds` None keeps it for ever."""

    request: int
    path: str
    ttl_seconds: int | None


class CopyCheckpoint(msgspec.Struct, frozen=True, tag="copy_checkpoint"):
    """Into a new run of the asking tenant."""

    request: int
    nonce: str
    path: str
    slot: Slot | None = None
    ttl_seconds: int | None = None


class MintToken(msgspec.Struct, frozen=True, tag="mint_token"):
    """A token that stands for the tenant for an hour: `Hello.api_key` takes it in place of a key."""

    request: int


class RevokeKey(msgspec.Struct, frozen=True, tag="revoke_key"):
    """A key of the asking tenant, or the one behind a token. What was opened with it is closed, and its tokens end."""

    request: int
    api_key: str


class CountClientEvents(msgspec.Struct, frozen=True, tag="count_client_events"):
    """What a client's program reported of itself: counted, and not kept. `failures` of the `events` were errors."""

    request: int
    events: Count
    failures: Count


class UsageBetween(msgspec.Struct, frozen=True, tag="usage_between"):
    """Usage by hour; `start` and `end` are Unix seconds."""

    request: int
    start: float
    end: float


class LaneState(msgspec.Struct, frozen=True, tag="lane_state"):
    """Whether a run or a sampler can be used: waits up to `timeout_s` seconds while its model is being loaded."""

    request: int
    lane: LaneId
    timeout_s: float


class QueueState(msgspec.Struct, frozen=True, tag="queue_state"):
    """Why a future has not resolved yet."""

    request: int
    future: FutureId


class Completions(msgspec.Struct, frozen=True, tag="completions"):
    """What resolved in a lane after `cursor`, with seqs from `low` to below `high`. The answer waits up to `timeout_s`
    seconds for the first."""

    request: int
    lane: LaneId
    low: Count
    high: Count
    cursor: Count = 0
    timeout_s: float = 30.0


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    pass


CatalogueRequest: TypeAlias = (
    Query
    | CreateClientSession
    | TouchClientSession
    | FinishClientSession
    | JoinSampler
    | DeleteCheckpoint
    | PublishCheckpoint
    | ExpireCheckpoint
    | CopyCheckpoint
    | MintToken
    | RevokeKey
    | CountClientEvents
    | UsageBetween
    | LaneState
    | QueueState
    | Completions
)
FromClient: TypeAlias = (
    Hello | Probe | CreateRun | CreateSampler | Submit | Refuse | Watch | Cancel | CatalogueRequest | Ping | Goodbye
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
    """While the model is being loaded, the run is there already; `Query` "run" waits, and says whether it fits."""

    run: str


class Readiness(msgspec.Struct, frozen=True):
    """Models by the state that they are in."""

    ready: int
    loading: int
    failed: int


class SamplerCreated(msgspec.Struct, frozen=True):
    sampler: str
    base_model: str


class SamplerInfo(msgspec.Struct, frozen=True):
    sampler: str
    base_model: str
    tokenizer_id: str
    model_path: str | None = None


class SamplerJoined(msgspec.Struct, frozen=True):
    client: int


class ClientSessionCreated(msgspec.Struct, frozen=True):
    session: str


class CheckpointCopied(msgspec.Struct, frozen=True):
    path: str


class FutureState(msgspec.Struct, frozen=True):
    state: Literal["active", "paused_capacity", "paused_rate_limit"]
    reason: str


class Completed(msgspec.Struct, frozen=True):
    """`size_bytes` is the encoded result's; 0 for a failure."""

    future: FutureId
    failed: bool
    size_bytes: int


class CompletedSince(msgspec.Struct, frozen=True):
    completed: list[Completed]
    cursor: int
