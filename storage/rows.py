"""The rows that the scheduler reads and writes, as typed values. A row knows nothing of the table it lies in."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ..wire.client_messages import CommandArguments
from ..wire.commands import CommandKind
from ..wire.ids import ActorId, FutureId, KeyHash, KeyId, LaneId, ProjectId, RunId, SamplerId, TenantId
from ..wire.limits import Scope
from ..wire.types import DEFAULT_PROJECT, LoraConfig, UsageKind

CheckpointKind: TypeAlias = Literal["training", "sampler", "external"]


@dataclass(frozen=True, slots=True)
class TenantRow:
    """`weight` says how large its share is beside others', while both wait. One that was removed has no keys; what it
    used stays in the bills."""

    id: TenantId
    weight: float
    created_at: float
    removed_at: float | None = None


@dataclass(frozen=True, slots=True)
class KeyRow:
    """All times are Unix seconds. One that is revoked, or has expired, opens nothing; its row stays, for what was used
    with it is told by its name."""

    hash: KeyHash
    id: KeyId
    tenant: TenantId
    name: str
    scopes: frozenset[Scope]
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    used_at: float | None = None


@dataclass(frozen=True, slots=True)
class RunRow:
    """`lora.seed` is always set. `restore_seq` is the last command that the state in `restore_folder` covers, and the
    former point the one before; without a folder it is what the seed makes, and covers nothing. The actor that holds
    the run writes its next snapshot to `snapshot_folder`. `replay_s` is what repeating the commands behind the restore
    point would cost, in seconds of the device. `key` is the one that it was made with."""

    id: RunId
    tenant: TenantId
    nonce: str
    base_model: str
    lora: LoraConfig
    user_metadata: dict[str, str]
    created_at: float
    last_request_at: float
    restore_folder: str | None = None
    restore_seq: int = -1
    session: str | None = None
    first_seq: int = 0
    former_folder: str | None = None
    former_seq: int = -1
    snapshot_folder: str | None = None
    replay_s: float = 0.0
    key: KeyId | None = None
    project: ProjectId = DEFAULT_PROJECT
    priority: int = 0


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """`folder` holds its weights, whatever becomes of the name at `model_path` later; None for the bare base model, and
    for one whose weights are gone (`outlived`). One that is `in_flight` gets the next weights that its run saves so."""

    id: SamplerId
    tenant: TenantId
    nonce: str
    base_model: str
    model_path: str | None
    created_at: float
    session: str | None = None
    clients: int = 0
    folder: str | None = None
    outlived: bool = False
    project: ProjectId = DEFAULT_PROJECT
    priority: int = 0
    in_flight: bool = False


@dataclass(frozen=True, slots=True)
class ClientSessionRow:
    """`reason` is the client's own word on how it ended, None while it has said none."""

    id: str
    tenant: TenantId
    client: str
    tags: list[str]
    user_metadata: dict[str, str]
    display_name: str | None
    created_at: float
    reason: Literal["success", "errored", "interrupted"] | None = None
    detail: str | None = None
    project: ProjectId = DEFAULT_PROJECT


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """`seq` is that of the command that saved it; `folder` is named by the broker, never by a client.

    An ephemeral one has no name of a user's choosing nor a time to live, and is not listed.
    """

    path: str
    run: RunId
    tenant: TenantId
    kind: CheckpointKind
    name: str
    folder: str
    seq: int
    size_bytes: int
    checksum: str
    created_at: float
    expires_at: float | None
    public: bool = False
    ephemeral: bool = False
    user_metadata: dict[str, str] = field(default_factory=dict[str, str])


CommandState: TypeAlias = Literal["queued", "done", "failed", "discarded"]
"""`discarded` is failed, and the run's pending gradient was dropped with it."""


@dataclass(frozen=True, slots=True)
class CommandRow:
    """`folder` is what a save writes and a load reads: names are looked up once, when the command is accepted.
    `prefix` names the beginnings of a prompt, and who may share what is computed of them; the journal keeps neither
    that nor `traceparent`, the span that those of the command are children of. `key` is the one that it came with,
    `project` the one that its run or sampler was in. `deadline`, in Unix seconds, is `timeout_s` after it was
    accepted, at `accepted_at`."""

    future: FutureId
    lane: LaneId
    seq: int
    kind: CommandKind
    tenant: TenantId
    base_model: str
    tokens: int
    rows: int
    arguments: CommandArguments
    folder: str | None = None
    state: CommandState = "queued"
    prefix: tuple[str, ...] = ()
    key: KeyId | None = None
    project: ProjectId = DEFAULT_PROJECT
    deadline: float | None = None
    timeout_s: float | None = None
    accepted_at: float = 0.0
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class UsedSeq:
    """What is known of a seq that was used before. `digest` is None where an older release wrote it."""

    kind: CommandKind
    state: CommandState
    digest: bytes | None


@dataclass(frozen=True, slots=True)
class ResultRow:
    """Exactly one of `error` (an encoded ErrorInfo) and `payload` (the encoded result) is set."""

    future: FutureId
    error: bytes | None
    payload: bytes | None


@dataclass(frozen=True, slots=True)
class Execution:
    """`started_at`, in Unix seconds, a command was handed out to an actor for the first of `attempts` times.
    `device_s` is its share of the device's time, None where its actor has not told."""

    started_at: float
    attempts: int
    device_s: float | None = None


@dataclass(frozen=True, slots=True)
class UsageEntry:
    """`price` is in micro-dollars per million tokens, `cost` in millionths of a micro-dollar."""

    future: FutureId
    kind: UsageKind
    tenant: TenantId
    run: str
    base_model: str
    tokens: int
    price: int
    cost: int
    key: KeyId | None = None
    project: ProjectId = DEFAULT_PROJECT


@dataclass(frozen=True, slots=True)
class ActorRow:
    id: ActorId
    base_model: str
    pid: int
    device: str
    dtype: str
    slots: int
    sample_share: float
    state: Literal["ready", "lost", "stopped"]
    started_at: float
