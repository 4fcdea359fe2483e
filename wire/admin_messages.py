"""What an administrator asks for, and is answered: who may come in, and how large a share each has.

By an operator, who can read the data folder, bare and with the key that lies there; or over a session that was opened
with a key whose scopes are `admin` among others.
"""

import secrets
from typing import TypeAlias

import msgspec

from .ids import KeyId, TenantId
from .limits import USER_SCOPES, Limits, Scope


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


AdminOrder: TypeAlias = (
    CreateKey | ListKeys | EndKey | CreateTenant | SetTenant | RemoveTenant | ListTenants | SetLimits | ListLimits
)


class Administer(msgspec.Struct, frozen=True, tag="administer"):
    """The answer's payload is a KeyCreated, a list of KeyInfo, TenantInfo or LimitsInfo, or nothing. `operator_key` is
    empty over a session."""

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
