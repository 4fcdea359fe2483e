"""Who may come in: keys, the tokens that stand for them, and what administrators change of either."""

from collections.abc import Callable
from datetime import UTC, datetime

from ...storage.keys import key_hash
from ...storage.reader import Reader
from ...storage.rows import KeyRow
from ...storage.store import Store
from ...storage.writer import Writer
from ...wire.admin_messages import AccessOrder
from ...wire.errors import AuthenticationError, NotFoundError, StorageUnavailableError
from ...wire.ids import KeyHash, TenantId
from ...wire.limits import Limits
from ...wire.types import AuditEvent
from ..planning.limits import Holder
from . import administration, tokens
from .administration import Carried, done, is_open
from .sessions import Session


class Keyring:
    """`weigh` is told what has become of a tenant's share, `limit` of what somebody may have."""

    def __init__(
        self,
        writer: Writer,
        reader: Reader,
        now: Callable[[], float],
        weigh: Callable[[TenantId, float], None],
        limit: Callable[[Holder, Limits], None],
    ) -> None:
        self._writer, self._reader, self._now, self._weigh, self._limit = writer, reader, now, weigh, limit
        self._token_secret = b""

    def load(self, store: Store) -> None:
        self._token_secret = store.token_secret()
        for tenant in store.tenants():
            self._weigh(tenant.id, tenant.weight)
        for holder, limits in store.limits().items():
            self._limit(Holder(holder), limits)

    def hash_of(self, api_key: str) -> KeyHash | None:
        """None for a token that is forged or has expired. The key itself may be no key of this server."""
        if api_key.startswith("eyJ"):
            return tokens.key_behind(api_key, self._now(), self._token_secret)
        return key_hash(api_key)

    async def find(self, api_key: str, tenant: TenantId | None = None) -> KeyRow | None:
        """Which key it is, of a tenant's if one is named, or its token stands for; also one that is over."""
        if (hash_ := self.hash_of(api_key)) is None:
            return None
        return await self._reader.read(lambda store: store.key_with(hash_, tenant))

    def over(self, key: KeyRow) -> AuthenticationError | None:
        """Why it opens nothing any more."""
        if is_open(key, self._now()):
            return None
        if key.revoked_at is None and key.expires_at is not None:
            at = datetime.fromtimestamp(key.expires_at, UTC).isoformat(timespec="seconds")
            return AuthenticationError(f"api_key is {_called(key)}, which expired at {at}", field="api_key")
        return revoked(key)

    def token_for(self, session: Session) -> str:
        return tokens.mint(session.tenant, session.key.hash, self._now(), self._token_secret)

    async def revoke(self, tenant: TenantId, api_key: str) -> None:
        """A key of the tenant's own. Raises NotFoundError."""
        key, now = await self.find(api_key, tenant), self._now()
        if key is None or not is_open(key, now):
            raise NotFoundError("there is no such key", field="api_key")

        def record(store: Store) -> None:
            store.key_revoked(key.id, now)
            store.audited(AuditEvent(now, tenant, key.id, "key_revoked", key.id))

        await self._writer.write_and_wait(record)

    async def carry_out(self, order: AccessOrder, by: str) -> Carried:
        """Raises InvalidRequestError, NotFoundError, StorageUnavailableError."""
        if self._writer.trouble is not None:
            raise StorageUnavailableError(self._writer.trouble)
        now = self._now()
        order = administration.checked(order, now)
        carried = done(await self._writer.write_and_wait(lambda store: administration.carry_out(store, order, now, by)))
        for tenant, weight in carried.weights:
            self._weigh(tenant, weight)
        for holder, limits in carried.limits:
            self._limit(holder, limits)
        return carried


def revoked(key: KeyRow) -> AuthenticationError:
    return AuthenticationError(f"api_key is {_called(key)}, which was revoked", field="api_key")


def _called(key: KeyRow) -> str:
    return f"{key.id} ({key.name})" if key.name else key.id
