"""For administrators: tenants, their keys, and what each may have at most."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

import msgspec
from fastapi import APIRouter
from starlette.responses import RedirectResponse, Response

from ...wire.admin_messages import (
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
    new_key_id,
)
from ...wire.errors import InvalidRequestError, NotFoundError
from ...wire.ids import KeyId, TenantId
from ...wire.limits import SCOPES, USER_SCOPES, Limits, Scope
from .forms import Form, FormOf
from .orders import ask, tell
from .rendering import page
from .visiting import PATH, Visitor, VisitorOf

router = APIRouter()

Kind: TypeAlias = Literal["int", "float", "names"]
_DAY_S = 86_400
EVERYONE = "everyone"


@dataclass(frozen=True, slots=True)
class Limited:
    """How a field of `Limits` is asked for."""

    name: str
    label: str
    kind: Kind = "int"


LIMITED = (
    Limited("runs", "Active runs"),
    Limited("rank", "Rank"),
    Limited("queued_tokens", "Queued tokens"),
    Limited("requests_per_s", "Requests a second", "float"),
    Limited("concurrent_samples", "Sequences at once"),
    Limited("stored_bytes", "Stored bytes"),
    Limited("monthly_usd", "USD a month", "float"),
    Limited("models", "Models, with commas", "names"),
    Limited("training_ttl_s", "Training states kept, s"),
    Limited("sampler_ttl_s", "Sampler weights kept, s"),
    Limited("external_ttl_s", "External weights kept, s"),
    Limited("keep_last", "Newest that a run keeps"),
)


@router.get("/tenants")
async def list_tenants(visitor: VisitorOf) -> Response:
    tenants = await ask(visitor, ListTenants(), list[TenantInfo])
    limits = {info.holder: info.limits for info in await ask(visitor, ListLimits(), list[LimitsInfo])}
    return page(
        visitor,
        "tenants.html",
        tenants=tenants,
        limited=LIMITED,
        limits=shown_limits(limits.get(EVERYONE, Limits())),
    )


@router.post("/tenants")
async def change_tenants(visitor: VisitorOf, form: FormOf) -> Response:
    """A new one, or everyone's limits."""
    match what := form.text("what"):
        case "create":
            tenant = TenantId(form.text("tenant").strip())
            await tell(visitor, CreateTenant(tenant, form.number("weight", float)))
            return _to(tenant)
        case "limit":
            await tell(visitor, SetLimits(EVERYONE, limits_of(form)))
            return RedirectResponse(f"{PATH}/tenants", 303)
        case _:
            raise InvalidRequestError.of("what", what, "create or limit")


@router.get("/tenants/{tenant}")
async def one_tenant(visitor: VisitorOf, tenant: str) -> Response:
    return await _shown(visitor, TenantId(tenant), None)


@router.post("/tenants/{tenant}")
async def change_tenant(visitor: VisitorOf, tenant: str, form: FormOf) -> Response:
    name = TenantId(tenant)
    match what := form.text("what"):
        case "weigh":
            await tell(visitor, SetTenant(name, form.number("weight", float) or 0.0))
        case "limit":
            await tell(visitor, SetLimits(f"tenant:{tenant}", limits_of(form)))
        case "remove":
            await tell(visitor, RemoveTenant(name))
            return RedirectResponse(f"{PATH}/tenants", 303)
        case "revoke":
            await tell(visitor, EndKey(KeyId(form.text("key"))))
        case "key":
            return await _shown(visitor, name, await _create_key(visitor, name, form))
        case _:
            raise InvalidRequestError.of("what", what, "weigh, limit, remove, revoke or key")
    return _to(name)


async def _create_key(visitor: Visitor, tenant: TenantId, form: Form) -> KeyCreated:
    days = form.number("days", float)
    expires_at = None if days is None else time.time() + days * _DAY_S
    scopes: list[Scope] = [scope for scope in SCOPES if scope in form.texts("scope")]
    order = CreateKey(new_key_id(), tenant, form.text("name").strip(), scopes, expires_at)
    return await ask(visitor, order, KeyCreated)


async def _shown(visitor: Visitor, name: TenantId, created: KeyCreated | None) -> Response:
    """A key is `created` once, and shown this once."""
    tenants = {info.tenant: info for info in await ask(visitor, ListTenants(), list[TenantInfo])}
    if name not in tenants:
        raise NotFoundError(f"there is no tenant {name!r}", field="tenant")
    limits = {info.holder: info.limits for info in await ask(visitor, ListLimits(), list[LimitsInfo])}
    keys = await ask(visitor, ListKeys(name), list[KeyInfo])
    return page(
        visitor,
        "tenant.html",
        tenant=tenants[name],
        keys=sorted(keys, key=lambda key: key.created_at, reverse=True),
        created=created,
        scopes=SCOPES,
        usual=USER_SCOPES,
        limited=LIMITED,
        limits=shown_limits(limits.get(f"tenant:{name}", Limits())),
    )


def limits_of(form: Form) -> Limits:
    """Raises InvalidRequestError."""
    said = {each.name: value for each in LIMITED if (value := _value(form, each)) is not None}
    try:
        return msgspec.convert(said, Limits)
    except msgspec.ValidationError as error:
        raise InvalidRequestError.of("limits", said, str(error)) from None


def _value(form: Form, limited: Limited) -> int | float | list[str] | None:
    match limited.kind:
        case "int":
            return form.number(limited.name, int)
        case "float":
            return form.number(limited.name, float)
        case "names":
            names = [name.strip() for name in form.text(limited.name).split(",")]
            return [name for name in names if name] or None


def shown_limits(limits: Limits) -> Mapping[str, str]:
    """As the form has them: empty is any number."""
    plain: dict[str, Any] = msgspec.to_builtins(limits)
    return {each.name: _text(plain.get(each.name)) for each in LIMITED}


def _text(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(value) if isinstance(value, list) else str(value)


def _to(tenant: TenantId) -> Response:
    return RedirectResponse(f"{PATH}/tenants/{quote(tenant, safe='')}", 303)
