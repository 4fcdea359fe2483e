"""What an administrator asks for, and is answered: who may come in, and how large a share each has.

By an operator, who can read the data folder, bare and with the key that lies there; or over a session that was opened
with a key whose scopes are `admin` among others.
"""

import secrets
from typing import Annotated, Literal, TypeAlias

import msgspec

from .ids import ActorId, KeyId, ProjectId, RunId, TenantId
from .limits import USER_SCOPES, Limits, Scope, Ttl
from .overview import JobsWanted

NAMES_AT_ONCE = 200


def new_key_id() -> KeyId:
    return KeyId("key-" + secrets.token_hex(6))


class CreateKey(msgspec.Struct, frozen=True, tag="create_key"):
    """A key of `tenant`, who is made if new. `key` is what it is to be called, `key-` and twelve hexadecimal digits of
    the asker's choosing: asked for twice, it is made once. `expires_at` is in Unix seconds, None for never."""

    key: KeyId
    tenant: TenantId
    name: str = ""
    scopes: list[Scope] = msgspec.field(default_factory=lambda: list(USER_SCOPES))
    expires_at: float | None = None


class ListKeys(msgspec.Struct, frozen=True, tag="list_keys"):
    """Those of `tenant`, None for everybody's; also what was revoked or has expired."""

    tenant: TenantId | None = None


class EndKey(msgspec.Struct, frozen=True, tag="end_key"):
    """It opens nothing any more, and what it has opened is closed."""

    key: KeyId


class CreateTenant(msgspec.Struct, frozen=True, tag="create_tenant"):
    """One that was removed is there again. Without a `weight` it has the one that it had, or 1."""

    tenant: TenantId
    weight: float | None = None


class SetTenant(msgspec.Struct, frozen=True, tag="set_tenant"):
    """A tenant of weight 2 gets twice the tokens of one of weight 1 while both have work waiting."""

    tenant: TenantId
    weight: float


class RemoveTenant(msgspec.Struct, frozen=True, tag="remove_tenant"):
    """Its keys are revoked; what it made and used stays."""

    tenant: TenantId


class ListTenants(msgspec.Struct, frozen=True, tag="list_tenants"):
    pass


class SetLimits(msgspec.Struct, frozen=True, tag="set_limits"):
    """In place of those that `holder` had: `everyone`, `tenant:NAME`, `project:TENANT/NAME` or `key:ID`. A tenant's own
    take the place of everyone's one by one; a project's and a key's count beside its tenant's."""

    holder: str
    limits: Limits


class ListLimits(msgspec.Struct, frozen=True, tag="list_limits"):
    pass


class ListJobs(msgspec.Struct, frozen=True, tag="list_jobs"):
    """Commands that are not over, and why; of whatever tenant."""

    wanted: JobsWanted = JobsWanted()


class LookOver(msgspec.Struct, frozen=True, tag="look_over"):
    """Actors, queues, tokens and who waits longest. Cheap enough to be asked every second."""


class FindHomes(msgspec.Struct, frozen=True, tag="find_homes"):
    """Which actor has the state of each: the answer is by run, without those that none has."""

    runs: Annotated[list[RunId], msgspec.Meta(max_length=NAMES_AT_ONCE)]


class StartDrain(msgspec.Struct, frozen=True, tag="start_drain"):
    """The actor is to end what it holds, save its runs and go. Answered when it was told: it goes on by itself, and
    where something supervises it, it is started again."""

    actor: ActorId


class LookAtEndings(msgspec.Struct, frozen=True, tag="look_at_endings"):
    """Actors that ended, and why; models that could not be loaded. The newest first."""


class LookAtStorage(msgspec.Struct, frozen=True, tag="look_at_storage"):
    """What is kept, and for whom."""


class Chosen(msgspec.Struct, frozen=True):
    """A checkpoint as somebody saw it. Another that has taken its name since is not meant."""

    path: str
    created_at: float


Choice: TypeAlias = Annotated[list[Chosen], msgspec.Meta(max_length=NAMES_AT_ONCE)]


class RemoveCheckpoints(msgspec.Struct, frozen=True, tag="remove_checkpoints"):
    """Of whatever tenants. The answer of this and of the next two are the paths of those that are not there."""

    chosen: Choice


class ShareCheckpoints(msgspec.Struct, frozen=True, tag="share_checkpoints"):
    """A public one can be read by every tenant who knows its path."""

    chosen: Choice
    public: bool


class LimitCheckpoints(msgspec.Struct, frozen=True, tag="limit_checkpoints"):
    """They are gone `ttl_seconds` from now; None keeps them for ever."""

    chosen: Choice
    ttl_seconds: Ttl | None


AccessOrder: TypeAlias = (
    CreateKey | ListKeys | EndKey | CreateTenant | SetTenant | RemoveTenant | ListTenants | SetLimits | ListLimits
)
"""Who may come in, and how much each may have."""
LookOrder: TypeAlias = ListJobs | LookOver | FindHomes | LookAtEndings | LookAtStorage
"""What goes on, and what is there, as the broker that serves has it."""
CheckpointOrder: TypeAlias = RemoveCheckpoints | ShareCheckpoints | LimitCheckpoints
AdminOrder: TypeAlias = AccessOrder | LookOrder | CheckpointOrder | StartDrain


class Administer(msgspec.Struct, frozen=True, tag="administer"):
    """The answer's payload is a KeyCreated, a list of KeyInfo, TenantInfo, LimitsInfo or Ending, Jobs, an Overview, a
    StorageOverview, or nothing.
    `operator_key` is empty over a session."""

    request: int
    order: AdminOrder
    operator_key: str = ""


class KeyInfo(msgspec.Struct, frozen=True):
    """Times are Unix seconds."""

    key: KeyId
    tenant: TenantId
    name: str
    scopes: list[Scope]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    used_at: float | None


class KeyCreated(msgspec.Struct, frozen=True):
    """`api_key` is shown this once: only its hash is kept."""

    api_key: str
    info: KeyInfo


class TenantInfo(msgspec.Struct, frozen=True):
    """`keys` are those that open something."""

    tenant: TenantId
    weight: float
    keys: int
    created_at: float
    removed_at: float | None


class LimitsInfo(msgspec.Struct, frozen=True):
    holder: str
    limits: Limits


class Ending(msgspec.Struct, frozen=True):
    """`how` is lost, stopped or load failed; `at` is in Unix seconds."""

    at: float
    actor: ActorId
    how: Literal["lost", "stopped", "load failed"]
    why: str


class KeptBy(msgspec.Struct, frozen=True):
    """Checkpoints with names of one project of a tenant. `tenant_limit_bytes` is what its tenant may have of them in
    all its projects, None for any number."""

    tenant: TenantId
    project: ProjectId
    checkpoints: int
    bytes: int
    usd_a_month: float
    tenant_limit_bytes: int | None


class StorageOverview(msgspec.Struct, frozen=True):
    """Bytes of the database with its log; and of the disk where the data folder lies, in all and those that are free.
    `kept` are the largest first."""

    database_bytes: int
    free_bytes: int
    total_bytes: int
    kept: list[KeptBy]
