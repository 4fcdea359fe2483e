"""Checkpoints: listed, deleted, published, given a time to live. Downloading them is `downloads`."""

from collections import defaultdict
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from pydantic import BaseModel, Field
from tinker.types import (
    CheckpointsListResponse,
    CurrentCheckpointStorageUsageResponse,
    Cursor,
)
from tinker.types.current_checkpoint_storage_usage_response import CurrentCheckpointStorageUsageItem

from ...wire.catalogue_messages import (
    CheckpointFilter,
    DeleteCheckpoint,
    DeleteCheckpoints,
    ExpireCheckpoint,
    PublishCheckpoint,
)
from ...wire.ids import ProjectId
from ...wire.types import Checkpoint
from ..bodies import body_of
from ..broker import BrokerOf
from .runs import checkpoint_to_sdk
from .sessions import check_projects

router = APIRouter()

_OF_RUN = "/training_runs/{run_id}/checkpoints"
_ONE = _OF_RUN + "/{checkpoint_id:path}"


class _Chosen(BaseModel, extra="forbid"):
    training_run_id: str | None = None
    project_id: str | None = None
    kind: Literal["training", "sampler", "external"] | None = None
    older_than_s: float | None = Field(None, ge=0)
    user_metadata: dict[str, str] = {}
    but_newest: int | None = Field(None, ge=0, lt=2**53)
    public: bool = False
    only_tell: bool = False


class _Ttl(BaseModel):
    """The SDK sends this from a plain dict; it has no type of it. None keeps the checkpoint for ever."""

    ttl_seconds: int | None = None


@router.get("/checkpoints")
async def list_user_checkpoints(broker: BrokerOf, limit: int = 100, offset: int = 0) -> CheckpointsListResponse:
    """Newest first."""
    found = sorted(await broker.look("checkpoints", list[Checkpoint]), key=lambda c: c.time, reverse=True)
    cursor = Cursor(offset=offset, limit=limit, total_count=len(found))
    return CheckpointsListResponse(
        checkpoints=[checkpoint_to_sdk(c) for c in found[offset : offset + limit]], cursor=cursor
    )


@router.post("/checkpoints/delete")
async def delete_checkpoints(
    broker: BrokerOf, body: Annotated[_Chosen, Depends(body_of(_Chosen))]
) -> CheckpointsListResponse:
    """Lorry's own: all that have what is said, which cannot be nothing. Answers what they are."""
    chosen = CheckpointFilter(
        body.training_run_id,
        ProjectId(body.project_id) if body.project_id is not None else None,
        body.kind,
        body.older_than_s,
        body.user_metadata,
        body.but_newest,
        body.public,
    )
    found = await broker.ask(lambda number: DeleteCheckpoints(number, chosen, body.only_tell), list[Checkpoint])
    return CheckpointsListResponse(checkpoints=[checkpoint_to_sdk(checkpoint) for checkpoint in found])


@router.get(_OF_RUN)
async def list_checkpoints(broker: BrokerOf, run_id: str) -> CheckpointsListResponse:
    found = await broker.look("checkpoints", list[Checkpoint], run_id)
    return CheckpointsListResponse(checkpoints=[checkpoint_to_sdk(c) for c in found])


@router.post(_ONE + "/publish", status_code=204)
async def publish_checkpoint(broker: BrokerOf, run_id: str, checkpoint_id: str) -> Response:
    await broker.tell(lambda number: PublishCheckpoint(number, f"tinker://{run_id}/{checkpoint_id}", True))
    return Response(status_code=204)


@router.delete(_ONE + "/publish", status_code=204)
async def unpublish_checkpoint(broker: BrokerOf, run_id: str, checkpoint_id: str) -> Response:
    await broker.tell(lambda number: PublishCheckpoint(number, f"tinker://{run_id}/{checkpoint_id}", False))
    return Response(status_code=204)


@router.put(_ONE + "/ttl", status_code=204)
async def set_checkpoint_ttl(
    broker: BrokerOf, run_id: str, checkpoint_id: str, body: Annotated[_Ttl, Depends(body_of(_Ttl))]
) -> Response:
    path = f"tinker://{run_id}/{checkpoint_id}"
    await broker.tell(lambda number: ExpireCheckpoint(number, path, body.ttl_seconds))
    return Response(status_code=204)


@router.delete(_ONE, status_code=204)
async def delete_checkpoint(broker: BrokerOf, run_id: str, checkpoint_id: str) -> Response:
    await broker.tell(lambda number: DeleteCheckpoint(number, f"tinker://{run_id}/{checkpoint_id}"))
    return Response(status_code=204)


@router.get("/billing/usage/checkpoints/current")
async def checkpoint_storage(broker: BrokerOf, project_id: str | None = None) -> CurrentCheckpointStorageUsageResponse:
    """Of each project that keeps some."""
    if project_id is not None:
        await check_projects(broker, [project_id])
    tenant, found = await broker.look("tenant", str), await broker.look("checkpoints", list[Checkpoint])
    kept = defaultdict[str, list[Checkpoint]](list)
    for checkpoint in found:
        if project_id in (None, checkpoint.project):
            kept[checkpoint.project].append(checkpoint)
    usd = await broker.look("storage_price", float)
    return CurrentCheckpointStorageUsageResponse(
        effective_rate_usd_per_gigabyte_month=usd, data=[_stored(tenant, usd, *item) for item in kept.items()]
    )


def _stored(tenant: str, usd: float, project: str, kept: list[Checkpoint]) -> CurrentCheckpointStorageUsageItem:
    size = sum(checkpoint.size_bytes for checkpoint in kept)
    return CurrentCheckpointStorageUsageItem(
        project_id=project,
        org_user_urn=f"lorry:tenant:{tenant}",
        user_name=tenant,
        checkpoint_count=len(kept),
        size_bytes=size,
        size_gigabytes=size / 1e9,
        estimated_monthly_cost_usd=size / 1e9 * usd,
    )
