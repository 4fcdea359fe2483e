"""What a client asks the broker about, and what it changes beside commands; and the answers' payloads."""

from typing import Annotated, Literal, TypeAlias

import msgspec

from .commands import CommandKind
from .ids import FutureId, LaneId, ProjectId, TenantId
from .limits import Count
from .metrics import LatestMetrics, LogMetrics, ReadMetrics
from .overview import JobLimit
from .timelines import Place


class Slot(msgspec.Struct, frozen=True):
    """A numbered place in a client session. It names what is made there, so that making it twice makes it once."""

    session: str
    number: int


class JoinSampler(msgspec.Struct, frozen=True, tag="join_sampler"):
    """One more client of a sampler; the answer is its number, which no other of them has. The first is 0."""

    request: int
    sampler: str


class Query(msgspec.Struct, frozen=True, tag="query"):
    """`files` are a checkpoint's weights to be taken away, `weights` what is to be known of it; `storage_price` is in
    USD for a GB and a month of 720 hours; `lineage` is what came into the tenant's runs, or into one;
    `metric_names` are those of a run's numbers, and `failures` its newest commands that failed."""

    request: int
    what: Literal[
        "capabilities",
        "run",
        "sampler",
        "checkpoints",
        "usage",
        "sessions",
        "weights",
        "files",
        "tenant",
        "key",
        "projects",
        "storage_price",
        "lineage",
        "metric_names",
        "failures",
    ]
    subject: str | None = None


class FindRuns(msgspec.Struct, frozen=True, tag="find_runs", omit_defaults=True):
    """The tenant's runs: those of a `project`, of a `base_model`, and whose metadata has all of `user_metadata`, each
    where it is given."""

    request: int
    project: ProjectId | None = None
    base_model: str | None = None
    user_metadata: dict[str, str] = {}


class AssignProject(msgspec.Struct, frozen=True, tag="assign_project"):
    """From now on a client session, with all runs and samplers that were made in it, is in `project`, which is made if
    new. What was used stays where it was used."""

    request: int
    session: str
    project: ProjectId


class DeleteCheckpoint(msgspec.Struct, frozen=True, tag="delete_checkpoint"):
    request: int
    path: str


class CheckpointFilter(msgspec.Struct, frozen=True, omit_defaults=True):
    """Checkpoints with names that have all of what is said: of a `run`, of a `project`, of a `kind`, made more than
    `older_than_s` seconds ago, with all of this metadata, and not among the newest `but_newest` of their run and kind.
    Published ones only where `public` says so."""

    run: str | None = None
    project: ProjectId | None = None
    kind: Literal["training", "sampler", "external"] | None = None
    older_than_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    user_metadata: dict[str, str] = {}
    but_newest: Count | None = None
    public: bool = False


class DeleteCheckpoints(msgspec.Struct, frozen=True, tag="delete_checkpoints"):
    """All that the filter chooses, of which something has to be said; the answer is what they are. `only_tell` deletes
    none."""

    request: int
    chosen: CheckpointFilter
    only_tell: bool = False


class CreateClientSession(msgspec.Struct, frozen=True, tag="create_client_session"):
    """A client session outlives connections: it is what a user's program has while it runs. Its `project` is made if
    new."""

    request: int
    client: str
    tags: list[str] = []
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    project: ProjectId | None = None


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


class LendCheckpoint(msgspec.Struct, frozen=True, tag="lend_checkpoint"):
    """For a minute another tenant may read it, as if it were public: what that one has begun by then goes on."""

    request: int
    path: str
    tenant: TenantId


class ExpireCheckpoint(msgspec.Struct, frozen=True, tag="expire_checkpoint"):
    """`ttl_seconds` None keeps it for ever."""

    request: int
    path: str
    ttl_seconds: int | None


class SetPriority(msgspec.Struct, frozen=True, tag="set_priority"):
    """Of a run or a sampler, among the tenant's: what has a higher one goes first. Also of what waits already."""

    request: int
    lane: LaneId
    priority: int


class CopyCheckpoint(msgspec.Struct, frozen=True, tag="copy_checkpoint"):
    """Into a new run of the asking tenant, in its session's project, or the one that is said, which is made if new."""

    request: int
    nonce: str
    path: str
    slot: Slot | None = None
    ttl_seconds: int | None = None
    project: ProjectId | None = None


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


class AuditBetween(msgspec.Struct, frozen=True, tag="audit_between"):
    """Who did what, of the asking tenant, or of everybody where the key may administer; `start` and `end` are Unix
    seconds."""

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


class OwnJobs(msgspec.Struct, frozen=True, tag="own_jobs"):
    """The asking tenant's commands that are not over, as `JobsWanted` has it."""

    request: int
    run: str | None = None
    base_model: str | None = None
    kind: CommandKind | None = None
    limit: JobLimit = 50
    newest: bool = False


class SessionTimeline(msgspec.Struct, frozen=True, tag="session_timeline"):
    """What became of the commands of a client session, or of a run, and when: the next of them behind `after`."""

    request: int
    subject: str
    after: Place | None = None


class GetMetrics(msgspec.Struct, frozen=True, tag="get_metrics"):
    """What the broker has counted and sees, in Prometheus' text format. No tenant, run or key is named."""

    request: int


class Completions(msgspec.Struct, frozen=True, tag="completions"):
    """What resolved in a lane after `cursor`, with seqs from `low` to below `high`. The answer waits up to `timeout_s`
    seconds for the first."""

    request: int
    lane: LaneId
    low: Count
    high: Count
    cursor: Count = 0
    timeout_s: float = 30.0


CatalogueChange: TypeAlias = (
    CreateClientSession
    | AssignProject
    | FinishClientSession
    | JoinSampler
    | DeleteCheckpoint
    | DeleteCheckpoints
    | PublishCheckpoint
    | LendCheckpoint
    | ExpireCheckpoint
    | CopyCheckpoint
    | SetPriority
    | RevokeKey
    | CountClientEvents
    | LogMetrics
)
"""What has to be written down."""

CatalogueRequest: TypeAlias = (
    Query
    | FindRuns
    | TouchClientSession
    | MintToken
    | UsageBetween
    | AuditBetween
    | LaneState
    | QueueState
    | OwnJobs
    | SessionTimeline
    | GetMetrics
    | Completions
    | ReadMetrics
    | LatestMetrics
    | CatalogueChange
)


class SamplerInfo(msgspec.Struct, frozen=True):
    """`end_tokens` are those that end a sequence where a request names no others."""

    sampler: str
    base_model: str
    tokenizer_id: str
    model_path: str | None = None
    end_tokens: list[int] = []


class SamplerJoined(msgspec.Struct, frozen=True):
    client: int


class ClientSessionCreated(msgspec.Struct, frozen=True):
    session: str


class CheckpointCopied(msgspec.Struct, frozen=True):
    path: str


class FutureState(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of one that waits for its turn, `requests_before` of its own tenant are before it, and `tokens_before` of
    everybody's; `wait_s` seconds are estimated on a `basis`, None where there is none."""

    state: Literal["active", "paused_capacity", "paused_rate_limit"]
    reason: str
    requests_before: int | None = None
    tokens_before: int | None = None
    wait_s: float | None = None
    basis: str | None = None


class Completed(msgspec.Struct, frozen=True):
    """`size_bytes` is the encoded result's; 0 for a failure."""

    future: FutureId
    failed: bool
    size_bytes: int


class CompletedSince(msgspec.Struct, frozen=True):
    completed: list[Completed]
    cursor: int
