"""What administrators ask for, carried out on the store: by the broker while it serves, by the command line else."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..storage.rows import KeyRow
from ..storage.store import Store
from ..wire.admin_messages import (
    AdminOrder,
    CreateKey,
    CreateTenant,
    EndKey,
    KeyCreated,
    KeyInfo,
    LimitsInfo,
    ListKeys,
    ListLimits,
    ListTenants,
    RemoveTenant,
    SetLimits,
    SetTenant,
    TenantInfo,
)
from ..wire.errors import InvalidRequestError, LorryError, NotFoundError
from ..wire.ids import TenantId
from ..wire.types import SCOPES, Limits, Scope
from .planning.limits import EVERYONE, Holder

_KEY_ID = re.compile(r"key-[0-9a-f]{12}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
_NAME_AT_MOST = 128
_WEIGHT_AT_MOST = 1e6


@dataclass(frozen=True, slots=True)
class Carried:
    """`ended` are keys that open nothing any more; `weights` and `limits` what has become of somebody's."""

    answer: object = None
    ended: tuple[KeyRow, ...] = ()
    weights: tuple[tuple[TenantId, float], ...] = ()
    limits: tuple[tuple[Holder, Limits], ...] = ()


def checked(order: AdminOrder, now: float) -> AdminOrder:
    """Raises InvalidRequestError for what no deployment could carry out."""
    if isinstance(order, CreateKey):
        _check_key(order, now)
    if isinstance(order, CreateKey | CreateTenant) and not _TENANT.fullmatch(order.tenant):
        expected = "1 to 128 letters, digits, '.', '_', '@' or '-', starting with a letter or a digit"
        raise InvalidRequestError.of("tenant", order.tenant, expected)
    if isinstance(order, CreateTenant | SetTenant) and not 0 < order.weight <= _WEIGHT_AT_MOST:
        raise InvalidRequestError.of("weight", order.weight, f"a number above 0, at most {_WEIGHT_AT_MOST:,.0f}")
    return order


def _check_key(order: CreateKey, now: float) -> None:
    if not _KEY_ID.fullmatch(order.key):
        raise InvalidRequestError.of("key", order.key, "'key-' and twelve hexadecimal digits")
    if len(order.name) > _NAME_AT_MOST or not order.name.isprintable():
        raise InvalidRequestError.of("name", order.name, f"up to {_NAME_AT_MOST} printable characters")
    if not order.scopes:
        raise InvalidRequestError.of("scopes", order.scopes, f"one or more of {', '.join(SCOPES)}")
    if order.expires_at is not None and not order.expires_at > now:
        raise InvalidRequestError.of("expires_at", order.expires_at, "Unix seconds in the future, or None for never")


def carry_out(store: Store, order: AdminOrder, now: float) -> Carried | LorryError:
    """Inside a transaction, which an error that is returned has changed nothing in. `order` is `checked`."""
    match order:
        case CreateKey():
            store.tenant_made(order.tenant, now)
            scopes: list[Scope] = [scope for scope in SCOPES if scope in order.scopes]
            api_key = store.key_made(order.key, order.tenant, now, order.name, scopes, order.expires_at)
            (made,) = (row for row in store.api_keys(order.tenant) if row.id == order.key)
            return Carried(KeyCreated(api_key, info_of(made)))
        case ListKeys():
            return Carried([info_of(row) for row in store.api_keys(order.tenant)])
        case EndKey():
            return _end(store, lambda row: row.id == order.key, now) or no_key(order.key)
        case CreateTenant():
            store.tenant_made(order.tenant, now)
            store.tenant_weighed(order.tenant, order.weight)
            return Carried(weights=((order.tenant, order.weight),))
        case SetTenant():
            if not store.has_tenant(order.tenant):
                return no_tenant(order.tenant)
            store.tenant_weighed(order.tenant, order.weight)
            return Carried(weights=((order.tenant, order.weight),))
        case RemoveTenant():
            if not store.has_tenant(order.tenant):
                return no_tenant(order.tenant)
            store.tenant_removed(order.tenant, now)
            return _end(store, lambda row: row.tenant == order.tenant, now) or Carried()
        case ListTenants():
            return Carried(_tenants(store, now))
        case SetLimits():
            if (missing := _missing(store, order.holder)) is not None:
                return missing
            store.limits_set(order.holder, order.limits)
            return Carried(limits=((Holder(order.holder), order.limits),))
        case ListLimits():
            return Carried([LimitsInfo(holder, limits) for holder, limits in store.limits().items()])


def _missing(store: Store, holder: str) -> LorryError | None:
    """Who is not there to have limits."""
    kind, _, name = holder.partition(":")
    match kind:
        case "tenant":
            return None if store.has_tenant(TenantId(name)) else no_tenant(name)
        case "key":
            return None if any(row.id == name for row in store.api_keys()) else no_key(name)
        case _:
            return None if holder == EVERYONE else no_holder(holder)


def no_holder(holder: str) -> InvalidRequestError:
    return InvalidRequestError.of("holder", holder, "everyone, tenant:NAME or key:ID")


def no_tenant(tenant: str) -> NotFoundError:
    return NotFoundError(f"there is no tenant {tenant!r}: `lorry tenants create` makes one", field="tenant")


def no_key(key: str) -> NotFoundError:
    return NotFoundError(f"there is no key {key!r}: `lorry keys ls` shows what they are called", field="key")


def is_open(key: KeyRow, now: float) -> bool:
    return key.revoked_at is None and not has_expired(key, now)


def has_expired(key: KeyRow, now: float) -> bool:
    return key.expires_at is not None and key.expires_at <= now


def _end(store: Store, chosen: Callable[[KeyRow], bool], now: float) -> Carried | None:
    """None where nothing was chosen."""
    ended = tuple(row for row in store.api_keys() if chosen(row))
    for row in ended:
        store.key_revoked(row.id, now)
    return Carried(ended=ended) if ended else None


def _tenants(store: Store, now: float) -> list[TenantInfo]:
    keys = [row.tenant for row in store.api_keys() if is_open(row, now)]
    return [
        TenantInfo(row.id, row.weight, keys.count(row.id), row.created_at, row.removed_at) for row in store.tenants()
    ]


def info_of(row: KeyRow) -> KeyInfo:
    scopes: list[Scope] = [scope for scope in SCOPES if scope in row.scopes]
    return KeyInfo(row.id, row.tenant, row.name, scopes, row.created_at, row.expires_at, row.revoked_at, row.used_at)
