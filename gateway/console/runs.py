"""A tenant's runs: listed and found, one by one, and several over each other."""

import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import RedirectResponse, Response

from ...wire.catalogue_messages import FindRuns
from ...wire.errors import InvalidRequestError, NotFoundError
from ...wire.lineage import Descent
from ...wire.metrics import RunPoint
from ...wire.timelines import FailedCommand
from ...wire.types import ClientSession, TrainingRun
from ..broker import Broker
from .alarms import Alarm, Told, alarms
from .checkpoints import checkpoints_of
from .curves import RUNS_AT_ONCE, label, latest_points
from .lineage import run_of
from .listing import STATES, Listed, Wanted, listed, slice_of
from .rendering import page
from .visiting import PATH, VisitorOf
from .waiting import count_by_run, jobs_of

router = APIRouter()

_A_PAGE = 50
_RUNS_WATCHED = 50
_LOOKED_AT = 100
"""Of the newest points of each source, for alarms."""
LOSS = "loss:sum"


@router.get("/")
async def first_page(visitor: VisitorOf) -> Response:
    return RedirectResponse(PATH + ("/runs" if visitor.may("read") else "/deployment"), 303)


async def runs_of(broker: Broker) -> list[Listed]:
    """The one that was used last comes first."""
    runs = await broker.ask(FindRuns, list[TrainingRun])
    sessions = await broker.look("sessions", list[ClientSession])
    return listed(runs, sessions, count_by_run(await jobs_of(broker)), time.time())


async def find(broker: Broker, run_id: str) -> Listed:
    """Raises NotFoundError."""
    for run in await runs_of(broker):
        if run.id == run_id:
            return run
    raise NotFoundError(f"there is no run {run_id!r}", field="run")


async def latest_of(broker: Broker, runs: Sequence[str]) -> dict[str, RunPoint]:
    """What training told last of each."""
    return {point.run: point for point in await latest_points(broker, runs) if point.source == "training"}


@router.get("/runs")
async def runs(
    visitor: VisitorOf,
    q: Annotated[str, Query()] = "",
    project: Annotated[str, Query()] = "",
    state: Annotated[str, Query()] = "",
    page_number: Annotated[int, Query(alias="page", ge=1)] = 1,
) -> Response:
    every = await runs_of(visitor.broker)
    wanted = Wanted(q, project, state)
    shown = slice_of([run for run in every if wanted.takes(run)], page_number, _A_PAGE)
    return page(
        visitor,
        "runs.html",
        shown=shown,
        wanted=wanted,
        projects=sorted({run.run.project for run in every}),
        states=STATES,
        latest=await latest_of(visitor.broker, [run.id for run in shown.rows]),
        loss=LOSS,
        most=RUNS_AT_ONCE,
    )


@router.get("/runs/{run_id}")
async def one_run(visitor: VisitorOf, run_id: str) -> Response:
    found = await find(visitor.broker, run_id)
    descents = await visitor.broker.look("lineage", list[Descent], run_id)
    return page(
        visitor,
        "run.html",
        run=found,
        **await state_of(visitor.broker, found),
        shown=await checkpoints_of(visitor.broker, run_id),
        descents=[(descent, run_of(descent.path)) for descent in descents],
    )


@router.get("/compare")
async def compare(visitor: VisitorOf, run: Annotated[list[str], Query()] = []) -> Response:  # noqa: B006
    ids = list(dict.fromkeys(run))
    if not 0 < len(ids) <= RUNS_AT_ONCE:
        raise InvalidRequestError.of("run", len(ids), f"1 to {RUNS_AT_ONCE} runs")
    there = {each.id: each for each in await runs_of(visitor.broker)}
    if missing := [each for each in ids if each not in there]:
        raise NotFoundError(f"there is no run {missing[0]!r}", field="run")
    latest = await latest_of(visitor.broker, ids)
    rows = [(there[each], label(each), latest.get(each)) for each in ids]
    return page(visitor, "compare.html", rows=rows, loss=LOSS)


@router.get("/alarms")
async def all_alarms(visitor: VisitorOf) -> Response:
    """Of the runs that were used last."""
    watched = (await runs_of(visitor.broker))[:_RUNS_WATCHED]
    found = [(run, await alarms_of(visitor.broker, run, run.waiting)) for run in watched]
    return page(visitor, "alarms.html", found=[each for each in found if each[1]], watched=len(watched))


async def state_of(broker: Broker, run: Listed) -> dict[str, Any]:
    """What of a run's page changes while it trains, but for its curves."""
    jobs = await jobs_of(broker, run.id, limit=20)
    return {"alarms": await alarms_of(broker, run, jobs.total), "jobs": jobs}


async def alarms_of(broker: Broker, run: Listed, waiting: int) -> list[Alarm]:
    is_over = run.state in ("finished", "errored", "interrupted")
    failures = await broker.look("failures", list[FailedCommand], run.id)
    points = await latest_points(broker, [run.id], _LOOKED_AT)
    return alarms(Told(points, failures, is_over, waiting), time.time())
