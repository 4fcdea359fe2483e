"""Training runs: listed, with their newest checkpoints; and what it takes to load a checkpoint elsewhere."""

import secrets
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field
from tinker.types import Checkpoint as SdkCheckpoint
from tinker.types import CopyWeightsRequest, CopyWeightsResponse, Cursor, TrainingRunsResponse, WeightsInfoResponse
from tinker.types import TrainingRun as SdkTrainingRun

from ...wire.catalogue_messages import CheckpointCopied, CopyCheckpoint, FindRuns, SetPriority, Slot
from ...wire.errors import InvalidRequestError, NotFoundError
from ...wire.ids import LaneId, ProjectId
from ...wire.types import Checkpoint, TrainingRun, WeightsInfo
from ..bodies import body_of
from ..broker import Broker, BrokerOf
from .moments import moment
from .sessions import check_projects, project_of

router = APIRouter()


class _WeightsInfo(BaseModel):
    """The SDK sends this from a plain dict; it has no type of it."""

    tinker_path: str


class _Priority(BaseModel):
    priority: int = Field(ge=-(2**31), lt=2**31)


def checkpoint_to_sdk(checkpoint: Checkpoint) -> SdkCheckpoint:
    return SdkCheckpoint(
        checkpoint_id=checkpoint.checkpoint_id,
        checkpoint_type=checkpoint.checkpoint_type,
        time=moment(checkpoint.time),
        tinker_path=checkpoint.tinker_path,
        size_bytes=checkpoint.size_bytes,
        public=checkpoint.public,
        user_metadata=checkpoint.user_metadata,
        expires_at=None if checkpoint.expires_at is None else moment(checkpoint.expires_at),
    )


async def _runs(
    broker: Broker, project: ProjectId | None = None, user_metadata: Mapping[str, str] | None = None
) -> list[SdkTrainingRun]:
    """The one used last comes first."""
    metadata = dict(user_metadata or {})
    runs = await broker.ask(lambda number: FindRuns(number, project, None, metadata), list[TrainingRun])
    newest: dict[tuple[str, str], Checkpoint] = {}
    for checkpoint in sorted(await broker.look("checkpoints", list[Checkpoint]), key=lambda c: c.time):
        run = checkpoint.tinker_path.removeprefix("tinker://").partition("/")[0]
        newest[run, checkpoint.checkpoint_type] = checkpoint
    found: list[SdkTrainingRun] = []
    for run in sorted(runs, key=lambda run: run.last_request_time, reverse=True):
        trained, sampler = (newest.get((run.training_run_id, kind)) for kind in ("training", "sampler"))
        found.append(
            SdkTrainingRun(
                training_run_id=run.training_run_id,
                base_model=run.base_model,
                model_owner=run.model_owner,
                is_lora=run.is_lora,
                lora_rank=run.lora_rank,
                last_request_time=moment(run.last_request_time),
                last_checkpoint=trained and checkpoint_to_sdk(trained),
                last_sampler_checkpoint=sampler and checkpoint_to_sdk(sampler),
                user_metadata=run.user_metadata,
            )
        )
    return found


@router.get("/training_runs")
async def list_training_runs(
    broker: BrokerOf,
    limit: int = 20,
    offset: int = 0,
    project_id: str | None = None,
    user_metadata: Annotated[list[str], Query()] = [],  # noqa: B006
) -> TrainingRunsResponse:
    """Those of a project, and whose metadata has each KEY=VALUE of `user_metadata`, where they are given."""
    if project_id is not None:
        await check_projects(broker, [project_id])
    found = await _runs(broker, ProjectId(project_id) if project_id else None, _pairs(user_metadata))
    cursor = Cursor(offset=offset, limit=limit, total_count=len(found))
    return TrainingRunsResponse(training_runs=found[offset : offset + limit], cursor=cursor)


@router.get("/training_runs/{run_id}")
async def get_training_run(broker: BrokerOf, run_id: str) -> SdkTrainingRun:
    for run in await _runs(broker):
        if run.training_run_id == run_id:
            return run
    raise NotFoundError(f"there is no run {run_id!r}", field="training_run_id")


@router.post("/weights_info")
async def weights_info(
    broker: BrokerOf, body: Annotated[_WeightsInfo, Depends(body_of(_WeightsInfo))]
) -> WeightsInfoResponse:
    info = await broker.look("weights", WeightsInfo, body.tinker_path)
    return WeightsInfoResponse(
        base_model=info.base_model,
        is_lora=True,
        lora_rank=info.lora.rank,
        train_unembed=info.lora.train_unembed,
        train_mlp=info.lora.train_mlp,
        train_attn=info.lora.train_attn,
    )


@router.post("/copy_weights")
async def copy_weights(
    broker: BrokerOf, request: Request, body: Annotated[CopyWeightsRequest, Depends(body_of(CopyWeightsRequest))]
) -> CopyWeightsResponse:
    """Once for each idempotency key, which the SDK keeps over its retries."""
    token = request.headers.get("x-tinker-weights-access-token") or body.weights_access_token
    if token is not None:
        await broker.borrow(body.source_path, token)
    slot = None
    if body.session_id is not None and body.model_seq_id is not None:
        slot = Slot(body.session_id, body.model_seq_id)
    nonce = "copy-" + (request.headers.get("x-idempotency-key") or secrets.token_hex(16))
    project = project_of(body, "destination_project_id") if slot is None else None
    copied = await broker.ask(
        lambda number: CopyCheckpoint(number, nonce, body.source_path, slot, body.ttl_seconds, project),
        CheckpointCopied,
    )
    return CopyWeightsResponse(tinker_path=copied.path)


@router.put("/training_runs/{run_id}/priority", status_code=204)
async def set_priority_of_run(
    broker: BrokerOf, run_id: str, body: Annotated[_Priority, Depends(body_of(_Priority))]
) -> Response:
    """Lorry's own: the SDK has no word for it."""
    await broker.tell(lambda number: SetPriority(number, LaneId(run_id), body.priority))
    return Response(status_code=204)


@router.put("/samplers/{sampler_id}/priority", status_code=204)
async def set_priority_of_sampler(
    broker: BrokerOf, sampler_id: str, body: Annotated[_Priority, Depends(body_of(_Priority))]
) -> Response:
    await broker.tell(lambda number: SetPriority(number, LaneId(sampler_id), body.priority))
    return Response(status_code=204)


def _pairs(said: list[str]) -> dict[str, str]:
    """Raises InvalidRequestError."""
    for each in said:
        if "=" not in each:
            raise InvalidRequestError.of("user_metadata", each, "KEY=VALUE")
    return dict(each.split("=", 1) for each in said)
