"""Tenants, the API keys that open a connection for one, and how much either may have. Only a key's hash is kept.

Nothing here decides anything: methods are named for what they record or answer.
"""

import hashlib
import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from ..wire.admin_messages import new_key_id
from ..wire.ids import KeyHash, KeyId, TenantId
from ..wire.limits import USER_SCOPES, Limits, Scope
from .connection import Connection
from .rows import KeyRow, TenantRow


class Keys(Connection):
    # Tenants ---------------------------------------------------------------------------------------------------------

    def tenants(self) -> list[TenantRow]:
        rows = self.rows("SELECT id, weight, created_at, removed_at FROM tenants ORDER BY id")
        return [TenantRow(**row) for row in rows]

    def has_tenant(self, tenant: TenantId) -> bool:
        """Not one that was removed."""
        return bool(self.rows("SELECT 1 FROM tenants WHERE id = ? AND removed_at IS NULL", tenant))

    def tenant_made(self, tenant: TenantId, now: float) -> None:
        """If new; one that was removed is there again."""
        self._db.table("tenants").insert({"id": tenant, "created_at": now}, ignore=True)
        self._db.execute("UPDATE tenants SET removed_at = NULL WHERE id = ?", [tenant])

    def tenant_weighed(self, tenant: TenantId, weight: float) -> None:
        self._db.execute("UPDATE tenants SET weight = ? WHERE id = ?", [weight, tenant])

    def tenant_removed(self, tenant: TenantId, now: float) -> None:
        self._db.execute("UPDATE tenants SET removed_at = ? WHERE id = ?", [now, tenant])

    # Limits ----------------------------------------------------------------------------------------------------------

    def limits(self) -> dict[str, Limits]:
        rows = self.rows("SELECT holder, limits FROM limits ORDER BY holder")
        return {row["holder"]: msgspec.json.decode(row["limits"], type=Limits) for row in rows}

    def limits_set(self, holder: str, limits: Limits) -> None:
        values = {"holder": holder, "limits": msgspec.json.encode(limits).decode()}
        self._db.table("limits").insert(values, replace=True)

    # Keys ------------------------------------------------------------------------------------------------------------

    def create_key(
        self,
        tenant: TenantId,
        now: float,
        name: str = "",
        scopes: Iterable[Scope] = USER_SCOPES,
        expires_at: float | None = None,
    ) -> str:
        """A new key of `tenant`, who is made if new. This is the one time that it can be seen."""
        with self.transaction():
            self.tenant_made(tenant, now)
            return self.key_made(new_key_id(), tenant, now, name, scopes, expires_at)

    def key_made(
        self,
        id_: KeyId,
        tenant: TenantId,
        now: float,
        name: str = "",
        scopes: Iterable[Scope] = USER_SCOPES,
        expires_at: float | None = None,
    ) -> str:
        """The key itself. One that was made before under the same id is gone: whoever asks twice got no answer."""
        key = "tml-" + secrets.token_urlsafe(32)
        values = {
            "hash": key_hash(key),
            "id": id_,
            "tenant": tenant,
            "name": name,
            "scopes": ",".join(scopes),
            "created_at": now,
            "expires_at": expires_at,
        }
        self._db.execute("DELETE FROM api_keys WHERE id = ?", [id_])
        self._db.table("api_keys").insert(values)
        return key

    def key_with(self, hash_: KeyHash, tenant: TenantId | None = None) -> KeyRow | None:
        """A key has 256 random bits: one SHA-256 is as good as a slow hash, and the index look-up leaks nothing. Of a
        `tenant`, another's takes no longer than none."""
        rows = self.rows("SELECT * FROM api_keys WHERE hash = ? AND (? IS NULL OR tenant = ?)", hash_, tenant, tenant)
        return _key(rows[0]) if rows else None

    def api_keys(self, tenant: TenantId | None = None) -> list[KeyRow]:
        rows = self.rows("SELECT * FROM api_keys WHERE ? IS NULL OR tenant = ? ORDER BY created_at", tenant, tenant)
        return [_key(row) for row in rows]

    def key_used(self, id_: KeyId, now: float) -> None:
        self._db.execute("UPDATE api_keys SET used_at = ? WHERE id = ?", [now, id_])

    def key_revoked(self, id_: KeyId, now: float) -> None:
        self._db.execute("UPDATE api_keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", [now, id_])


def key_hash(key: str) -> KeyHash:
    return KeyHash(hashlib.sha256(key.encode()).hexdigest())


def _key(row: dict[str, Any]) -> KeyRow:
    scopes: dict[str, Any] = {"scopes": frozenset(row["scopes"].split(","))}
    return KeyRow(**(row | scopes))
