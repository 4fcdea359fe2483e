"""What administrators ask for, carried out on the store: by the broker while it serves, by the command line else."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ...storage.rows import KeyRow
from ...storage.store import Store
from ...wire.admin_messages import (
    AccessOrder,
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
from ...wire.errors import InvalidRequestError, LorryError, NotFoundError
from ...wire.ids import ProjectId, TenantId
from ...wire.limits import SCOPES, Limits, Scope
from ...wire.types import AuditEvent
from ..planning.limits import EVERYONE, Holder

_KEY_ID = re.compile(r"key-[0-9a-f]{12}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
_NAMED_SO = "1 to 128 letters, digits, '.', '_', '@' or '-', starting with a letter or a digit"
"""Tenants and projects."""
_NAME_AT_MOST = 128
_WEIGHTS = (1e-3, 1e6)
_YEAR_9999 = 253_402_300_799


@dataclass(frozen=True, slots=True)
class Carried:
    """`ended` are keys that open nothing any more; `weights` and `limits` what has become of somebody's."""

    answer: object = None
    ended: tuple[KeyRow, ...] = ()
    weights: tuple[tuple[TenantId, float], ...] = ()
    limits: tuple[tuple[Holder, Limits], ...] = ()


def done(carried: Carried | LorryError) -> Carried:
    """Raises the error: outside the transaction, or from within it, to change nothing."""
    if isinstance(carried, LorryError):
        raise carried
    return carried


def checked(order: AccessOrder, now: float) -> AccessOrder:
    """Raises InvalidRequestError for what no deployment could carry out."""
    if isinstance(order, CreateKey):
        _check_key(order, now)
    if isinstance(order, CreateTenant | SetTenant) and order.weight is not None:
        low, high = _WEIGHTS
        if not low <= order.weight <= high:
            raise InvalidRequestError.of("weight", order.weight, f"a number from {low:g} to {high:,.0f}")
    if isinstance(order, SetLimits):
        try:
            msgspec.convert(msgspec.to_builtins(order.limits), Limits)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"limits: {error}", field="limits") from None
    return order


def _check_key(order: CreateKey, now: float) -> None:
    if not _KEY_ID.fullmatch(order.key):
        raise InvalidRequestError.of("key", order.key, "'key-' and twelve hexadecimal digits")
    if len(order.name) > _NAME_AT_MOST or not order.name.isprintable():
        raise InvalidRequestError.of("name", order.name, f"up to {_NAME_AT_MOST} printable characters")
    if not order.scopes:
        raise InvalidRequestError.of("scopes", order.scopes, f"one or more of {', '.join(SCOPES)}")
    if order.expires_at is not None and not now < order.expires_at <= _YEAR_9999:
        raise InvalidRequestError.of("expires_at", order.expires_at, "Unix seconds in the future, or None for never")


def carry_out(store: Store, order: AccessOrder, now: float, by: str) -> Carried | LorryError:
    """Inside a transaction, which an error that is returned has changed nothing in. `order` is `checked`; `by` is the
    id of the key that it came with, or the operator."""
    carried = _carry_out(store, order, now)
    if isinstance(carried, Carried) and (what := _told(order, carried)) is not None:
        event, tenant, subject, detail = what
        store.audited(AuditEvent(now, tenant, by, event, subject, detail))
    return carried


def _told(order: AccessOrder, carried: Carried) -> tuple[str, str, str, dict[str, str]] | None:
    """For the audit log: what is done, of which tenant, to what, and how; None for what changes nothing."""
    match order:
        case CreateKey():
            detail = {"name": order.name, "scopes": ", ".join(order.scopes)}
            return "key_created", order.tenant, order.key, detail
        case EndKey():
            return "key_revoked", carried.ended[0].tenant, order.key, {}
        case CreateTenant():
            weight = {} if order.weight is None else {"weight": f"{order.weight:g}"}
            return "tenant_created", order.tenant, order.tenant, weight
        case SetTenant():
            return "tenant_weight_set", order.tenant, order.tenant, {"weight": f"{order.weight:g}"}
        case RemoveTenant():
            return "tenant_removed", order.tenant, order.tenant, {}
        case SetLimits():
            kind, _, name = order.holder.partition(":")
            tenant = name.partition("/")[0] if kind in ("tenant", "project") else ""
            said = msgspec.to_builtins(order.limits)
            return "limits_set", tenant, order.holder, {name: str(value) for name, value in said.items()}
        case ListKeys() | ListTenants() | ListLimits():
            return None


def _carry_out(store: Store, order: AccessOrder, now: float) -> Carried | LorryError:
    match order:
        case CreateKey():
            if (problem := _no_place_for(store, order)) is not None:
                return problem
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
            if (problem := _unnameable(store, order.tenant)) is not None:
                return problem
            store.tenant_made(order.tenant, now)
            if order.weight is None:
                return Carried()
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


def _no_place_for(store: Store, order: CreateKey) -> LorryError | None:
    """Where the tenant was removed, or the id is that of a key which somebody may have."""
    for tenant in store.tenants():
        if tenant.id == order.tenant and tenant.removed_at is not None:
            problem = f"tenant {order.tenant!r} was removed: `lorry tenants create` brings it back"
            return NotFoundError(problem, field="tenant")
    for row in store.api_keys():
        if row.id == order.key and (
            row.tenant != order.tenant or row.used_at is not None or row.revoked_at is not None
        ):
            return InvalidRequestError.of("key", order.key, "an id that no other key has")
    return _unnameable(store, order.tenant)


def _unnameable(store: Store, tenant: TenantId) -> LorryError | None:
    """Of a tenant that is new: older releases took any name."""
    if _NAME.fullmatch(tenant) or any(row.id == tenant for row in store.tenants()):
        return None
    return InvalidRequestError.of("tenant", tenant, _NAMED_SO)


def check_project(name: ProjectId) -> None:
    """Raises InvalidRequestError."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError.of("project", name, _NAMED_SO)


def _missing(store: Store, holder: str) -> LorryError | None:
    """Who is not there to have limits. A project may have some before anything is in it."""
    kind, _, name = holder.partition(":")
    match kind:
        case "tenant":
            return None if store.has_tenant(TenantId(name)) else no_tenant(name)
        case "project":
            tenant, _, project = name.rpartition("/")
            if not _NAME.fullmatch(project):
                return InvalidRequestError.of("project", project, _NAMED_SO)
            return None if store.has_tenant(TenantId(tenant)) else no_tenant(tenant)
        case "key":
            return None if any(row.id == name for row in store.api_keys()) else no_key(name)
        case _:
            return None if holder == EVERYONE else no_holder(holder)


def no_holder(holder: str) -> InvalidRequestError:
    return InvalidRequestError.of("holder", holder, "everyone, tenant:NAME, project:TENANT/NAME or key:ID")


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
