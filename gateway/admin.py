"""Tenants, keys and what goes on over HTTP, for keys with the scope `admin`; described at /admin/openapi.json."""

from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Query, Security
from fastapi.responses import Response
from fastapi.security import APIKeyHeader
from pydantic import BaseModel, ConfigDict, Field

from ..wire.admin_messages import (
    Administer,
    AdminOrder,
    CreateKey,
    CreateTenant,
    EndKey,
    KeyCreated,
    KeyInfo,
    LimitsInfo,
    ListJobs,
    ListKeys,
    ListLimits,
    ListTenants,
    RemoveTenant,
    SetLimits,
    SetTenant,
    TenantInfo,
    new_key_id,
)
from ..wire.ids import KeyId, TenantId
from ..wire.limits import TTL_AT_MOST_S, USER_SCOPES, Limits, Scope
from ..wire.overview import Jobs, JobsWanted
from . import errors, jobs
from .bodies import body_of
from .broker import Broker, BrokerOf

T = TypeVar("T")

# It describes: who is let in, the broker decides.
router = APIRouter(dependencies=[Security(APIKeyHeader(name="X-API-Key", auto_error=False))])


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewKey(_Body):
    """Times are Unix seconds."""

    tenant: str = Field(description="Whose it is to be; made if new")
    name: str = ""
    scopes: list[Scope] = list(USER_SCOPES)
    expires_at: float | None = None


class Key(_Body):
    key: str = Field(description="What it is called: it opens nothing")
    tenant: str
    name: str
    scopes: list[Scope]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    used_at: float | None


class CreatedKey(_Body):
    api_key: str = Field(description="Shown this once")
    info: Key


class NewTenant(_Body):
    tenant: str
    weight: float | None = Field(None, description="What it had, or 1, where nothing is said")


class TenantChange(_Body):
    weight: float = Field(description="One of weight 2 gets twice the tokens of one of 1 while both wait")


class Tenant(_Body):
    tenant: str
    weight: float
    keys: int = Field(description="Those that open something")
    created_at: float
    removed_at: float | None


class SomeLimits(_Body):
    """What is null is any number. A tenant's own take the place of everyone's one by one; a key's count beside its
    tenant's."""

    runs: int | None = Field(None, ge=0, lt=2**53, description="Active ones: that had a request within the hour")
    rank: int | None = Field(None, ge=0, lt=2**53)
    queued_tokens: int | None = Field(None, ge=0, lt=2**53, description="Of requests that wait or run")
    requests_per_s: float | None = Field(None, gt=0, le=1e6)
    concurrent_samples: int | None = Field(None, ge=0, lt=2**53, description="Sequences at the same time")
    stored_bytes: int | None = Field(None, ge=0, lt=2**53, description="Of checkpoints with names")
    monthly_usd: float | None = Field(None, ge=0, le=1e9, description="In a calendar month of UTC")
    models: list[str] | None = None
    training_ttl_s: int | None = Field(None, ge=1, le=TTL_AT_MOST_S, description="Of training states")
    sampler_ttl_s: int | None = Field(None, ge=1, le=TTL_AT_MOST_S, description="Of sampler weights")
    external_ttl_s: int | None = Field(None, ge=1, le=TTL_AT_MOST_S, description="Of external weights")
    keep_last: int | None = Field(None, ge=1, lt=2**53, description="With names, of each kind, that a run keeps")


def _takes(body: type[BaseModel]) -> dict[str, Any]:
    """Bodies are read within the gateway's budget, and after it is known whose they are: FastAPI describes only those
    that it reads itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}}


class HolderLimits(_Body):
    holder: str = Field(description="everyone, tenant:NAME, project:TENANT/NAME or key:ID")
    limits: SomeLimits


@router.get("/keys")
async def list_keys(broker: BrokerOf, tenant: Annotated[str | None, Query()] = None) -> list[Key]:
    found = await _ask(broker, ListKeys(None if tenant is None else TenantId(tenant)), list[KeyInfo])
    return [Key(**_plain(info)) for info in found]


@router.post("/keys", status_code=201, openapi_extra=_takes(NewKey))
async def create_key(broker: BrokerOf, new: Annotated[NewKey, Depends(body_of(NewKey))]) -> CreatedKey:
    order = CreateKey(new_key_id(), TenantId(new.tenant), new.name, new.scopes, new.expires_at)
    created = await _ask(broker, order, KeyCreated)
    return CreatedKey(api_key=created.api_key, info=Key(**_plain(created.info)))


@router.delete("/keys/{key}", status_code=204)
async def revoke_key(broker: BrokerOf, key: str) -> Response:
    """What it has opened is closed at once."""
    await _tell(broker, EndKey(KeyId(key)))
    return Response(status_code=204)


@router.get("/tenants")
async def list_tenants(broker: BrokerOf) -> list[Tenant]:
    return [Tenant(**_plain(info)) for info in await _ask(broker, ListTenants(), list[TenantInfo])]


@router.post("/tenants", status_code=204, openapi_extra=_takes(NewTenant))
async def create_tenant(broker: BrokerOf, new: Annotated[NewTenant, Depends(body_of(NewTenant))]) -> Response:
    """One that was removed is there again, with all that it had but its keys."""
    await _tell(broker, CreateTenant(TenantId(new.tenant), new.weight))
    return Response(status_code=204)


@router.patch("/tenants/{tenant}", status_code=204, openapi_extra=_takes(TenantChange))
async def set_tenant(
    broker: BrokerOf, tenant: str, change: Annotated[TenantChange, Depends(body_of(TenantChange))]
) -> Response:
    await _tell(broker, SetTenant(TenantId(tenant), change.weight))
    return Response(status_code=204)


@router.delete("/tenants/{tenant}", status_code=204)
async def remove_tenant(broker: BrokerOf, tenant: str) -> Response:
    """All its keys are revoked. What it made stays, and what it used in the bills."""
    await _tell(broker, RemoveTenant(TenantId(tenant)))
    return Response(status_code=204)


@router.get("/limits")
async def list_limits(broker: BrokerOf) -> list[HolderLimits]:
    found = await _ask(broker, ListLimits(), list[LimitsInfo])
    return [HolderLimits(holder=info.holder, limits=SomeLimits(**msgspec.to_builtins(info.limits))) for info in found]


@router.put("/limits/{holder:path}", status_code=204, openapi_extra=_takes(SomeLimits))
async def set_limits(
    broker: BrokerOf, holder: str, limits: Annotated[SomeLimits, Depends(body_of(SomeLimits))]
) -> Response:
    """In place of those that it had."""
    wanted = msgspec.convert(limits.model_dump(exclude_none=True), Limits)
    await _tell(broker, SetLimits(holder, wanted))
    return Response(status_code=204)


@router.get("/jobs")
async def list_jobs(
    broker: BrokerOf,
    tenant: Annotated[str | None, Query(description="Only this tenant's")] = None,
    run: jobs.Run = None,
    model: str | None = None,
    kind: jobs.Kind = None,
    limit: jobs.Limit = 50,
    newest: jobs.Newest = False,
) -> jobs.JobList:
    """What was accepted and is not over, whose, and why."""
    wanted = JobsWanted(None if tenant is None else TenantId(tenant), run, model, kind, limit, newest)
    return jobs.listed(await _ask(broker, ListJobs(wanted), Jobs))


def app(gateway: object) -> FastAPI:
    """An application of its own, so that its description is of nothing else."""
    built = FastAPI(title="Lorry administration", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    built.state.gateway = gateway
    errors.install(built)
    built.include_router(router)
    return built


async def _ask(broker: Broker, order: AdminOrder, kind: type[T]) -> T:
    return await broker.ask(lambda number: Administer(number, order), kind)


async def _tell(broker: Broker, order: AdminOrder) -> None:
    await broker.tell(lambda number: Administer(number, order))


def _plain(info: KeyInfo | TenantInfo) -> dict[str, Any]:
    return msgspec.to_builtins(info)
