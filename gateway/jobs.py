"""Commands that are not over, and why: a tenant's own. What administrators are told of all is `admin`'s."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel

from ..wire.catalogue_messages import OwnJobs
from ..wire.commands import CommandKind
from ..wire.overview import JOBS_AT_MOST, Jobs, JobState
from .broker import BrokerOf

router = APIRouter()

Run = Annotated[str | None, Query(description="Only this run's, with samplers of its weights, or a sampler's")]
Kind = Annotated[CommandKind | None, Query()]
Limit = Annotated[int, Query(ge=1, le=JOBS_AT_MOST, description="How many: the oldest")]
Newest = Annotated[bool, Query(description="The newest instead")]


class OneJob(BaseModel):
    """`accepted_at` is in Unix seconds. `state` and `reason` say why it is not over."""

    future: str
    tenant: str
    project: str
    lane: str
    run: str | None
    base_model: str
    kind: CommandKind
    tokens: int
    accepted_at: float
    state: JobState
    reason: str


class JobList(BaseModel):
    """Those of `total` that were asked for, at `at` in Unix seconds."""

    at: float
    total: int
    jobs: list[OneJob]


def listed(found: Jobs) -> JobList:
    plain: dict[str, Any] = msgspec.to_builtins(found)
    return JobList(at=found.at, total=found.total, jobs=[OneJob(**job) for job in plain["jobs"]])


@router.get("/jobs")
async def list_jobs(
    broker: BrokerOf,
    run: Run = None,
    model: str | None = None,
    kind: Kind = None,
    limit: Limit = 50,
    newest: Newest = False,
) -> JobList:
    return listed(await broker.ask(lambda number: OwnJobs(number, run, model, kind, limit, newest), Jobs))
