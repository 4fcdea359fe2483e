"""What a client and the broker say to each other. Headers only: a payload, where there is one, is the next frame.

Between a `Welcome` and the session's end they travel over a link (`sequenced`), which neither loses nor repeats any; a
hello, a probe, and what answers these, travel bare. A client that numbers nothing may send all of it bare,
and gets no more results than may be under way to one that reads none.

A request carries a number of the client's choosing, and its answer carries the same. After a hello that was necessary
anew it is sent again, which is harmless: runs and samplers are made once for each nonce, commands once for each
(lane, seq).
"""

from typing import Annotated, TypeAlias

import msgspec

from .admin_messages import Administer
from .catalogue_messages import CatalogueRequest, Slot
from .commands import CommandKind
from .errors import ErrorInfo
from .ids import ActorId, FutureId, LaneId, ProjectId, RunId, SessionId, TenantId
from .limits import Count
from .news import Follow, Followed, Unfollow
from .prefixes import MARKS_AT_MOST
from .tracing import Traceparent
from .types import LoraConfig

VERSION = 3


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First on every connection, and again whenever the broker answers `Unknown`. Where the session is there already,
    it is welcomed again, and that is all. Who `relays` results to others says by `Read` which of them got theirs; what
    all others are sent, they have read."""

    version: int
    api_key: str
    client: str
    relays: bool = False


class CreateRun(msgspec.Struct, frozen=True, tag="create_run"):
    """`first_seq` is the seq of the run's first command: some clients count from 1. A run that is made in a client
    session is in that one's project, any other in `project`, which is made if new."""

    request: int
    nonce: str
    base_model: str
    lora: LoraConfig
    user_metadata: dict[str, str] = {}
    slot: Slot | None = None
    first_seq: Count = 0
    project: ProjectId | None = None
    priority: int = 0


class CreateSampler(msgspec.Struct, frozen=True, tag="create_sampler"):
    """Of a base model, or of saved weights: exactly one of `base_model` and `model_path`. Its project is that of its
    client session, or `project`, or that of the run which saved the weights."""

    request: int
    nonce: str
    base_model: str | None = None
    model_path: str | None = None
    slot: Slot | None = None
    project: ProjectId | None = None
    priority: int = 0


class CommandArguments(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of a command that the broker acts on. `name` is a new checkpoint's, `path` an existing one's, which
    means what it means when the command is accepted.

    `stream` asks for a sample's tokens as they are made.

    `sampler_slot` asks save_weights_for_sampler for weights without a name, and a sampler of them in that place of the
    run's client session, which is `in_flight` if it is to have all newer weights that are saved so; `unnamed` for
    weights without a name alone; `external` for weights that are there to be downloaded. What has no name is kept while
    it is used, and for some saves of its run.
    """

    name: str | None = None
    path: str | None = None
    ttl_seconds: int | None = None
    optimizer: bool = False
    overwrite: bool = True
    external: bool = False
    sampler_slot: int | None = None
    in_flight: bool = False
    unnamed: bool = False
    user_metadata: dict[str, str] = {}
    stream: bool = False


class Submit(msgspec.Struct, frozen=True, tag="submit", omit_defaults=True):
    """`tokens` and `rows` are the client's estimate, for planning; what is billed is what the actor counts. `prefix`
    are the marks of a prompt (`prefixes`), so that it can go where it is known; without them it goes anywhere. What is
    not over `timeout_s` seconds after it was accepted is ended, unless it is being executed and cannot be.
    `traceparent` is the span that those of the command are children of."""

    request: int
    lane: LaneId
    seq: int
    kind: CommandKind
    tokens: Count = 0
    rows: Count = 0
    arguments: CommandArguments = CommandArguments()
    prefix: Annotated[list[Count], msgspec.Meta(max_length=MARKS_AT_MOST)] = []
    timeout_s: float | None = None
    traceparent: Traceparent | None = None


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


class Read(msgspec.Struct, frozen=True, tag="read"):
    """The results of these were passed on to who had asked for them."""

    request: int
    futures: list[FutureId]


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    request: int
    future: FutureId


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    pass


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """How many models are ready: the one question that needs no key, and the answer names none."""

    request: int


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """The deployment's operator wants an actor to end what it holds, save its runs and go; answered when it has."""

    request: int
    operator_key: str
    actor: ActorId


class ImportAdapter(msgspec.Struct, frozen=True, tag="import_adapter"):
    """The deployment's operator has put an adapter into the folder of `run`, which is new and of a name as the broker
    gives them, and wants it to be checkpoints of `tenant`. Sent twice, it is imported once."""

    request: int
    operator_key: str
    run: RunId
    tenant: TenantId
    base_model: str
    lora: LoraConfig
    name: str
    size_bytes: int
    checksum: str


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    pass


FromClient: TypeAlias = (
    Hello
    | Probe
    | Drain
    | ImportAdapter
    | Administer
    | CreateRun
    | CreateSampler
    | Submit
    | Refuse
    | Watch
    | Read
    | Cancel
    | CatalogueRequest
    | Follow
    | Unfollow
    | Ping
    | Goodbye
)


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The link is named after the session."""

    session: SessionId
    heartbeat_s: float
    max_payload_bytes: int


class Unknown(msgspec.Struct, frozen=True, tag="unknown"):
    """The broker does not know this session (it restarted, or the session expired): say hello again. `link` is the tag
    under which the message came that is answered so, if any."""

    link: bytes = b""


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


class Streamed(msgspec.Struct, frozen=True, tag="streamed"):
    """Tokens of samples that are not over: for each of `futures`, of which one may be named again, a payload, which is
    a list of `streaming.Piece`."""

    futures: list[FutureId]


class NewsCame(msgspec.Struct, frozen=True, tag="news"):
    """The payload is a `news.News` of what is followed."""

    of: Followed


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    pass


ToClient: TypeAlias = Welcome | Unknown | Answer | Failed | Resolved | Streamed | NewsCame | Pong


class RunCreated(msgspec.Struct, frozen=True):
    """While the model is being loaded, the run is there already; `Query` "run" waits, and says whether it fits."""

    run: str


class Readiness(msgspec.Struct, frozen=True):
    """Models by the state that they are in."""

    ready: int
    loading: int
    failed: int


class AdapterImported(msgspec.Struct, frozen=True):
    """Two names of the same weights: to load into a run, and to sample from."""

    training_path: str
    sampler_path: str


class SamplerCreated(msgspec.Struct, frozen=True):
    sampler: str
    base_model: str
