"""`lorry jobs`: what is not over, and why."""

import time
from collections.abc import Sequence
from enum import StrEnum
from itertools import groupby
from typing import Annotated, cast, get_args

import typer
from anyio import to_thread
from rich.console import Console
from rich.table import Table

from lorry import options
from lorry.administration import ask, is_served_now
from lorry.calling import run_async
from lorry.printing import plain_console
from lorry.service import Service, find_service
from lorry.storage.looking import looking
from lorry.storage.reports import waiting
from lorry.tables import ONE_RUN, AsJson, print_json, table
from lorry.wire.admin_messages import ListJobs
from lorry.wire.commands import CommandKind
from lorry.wire.ids import TenantId
from lorry.wire.overview import JOBS_AT_MOST, Job, Jobs, JobsWanted
from lorry.wire.words import lasting

Kind = StrEnum("Kind", list(get_args(CommandKind)))


def jobs(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's")] = None,
    run: Annotated[
        str | None, typer.Option(help="Only this run's, with samplers of its weights, or a sampler's")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only this base model's")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only these commands")] = None,
    limit: Annotated[int, typer.Option(min=1, max=JOBS_AT_MOST, help="How many: the oldest")] = 50,
    newest: Annotated[bool, typer.Option("--newest", help="The newest instead")] = False,
    as_json: AsJson = False,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Print what was accepted and is not over: whose, since when, and what it waits for."""
    of_kind = None if kind is None else cast("CommandKind", kind.value)
    wanted = JobsWanted(TenantId(tenant) if tenant else None, run, model, of_kind, limit, newest)

    async def run_() -> None:
        found = await find_jobs(find_service(connect, server_key, data), wanted)
        if as_json:
            print_json(found)
        else:
            print_jobs(plain_console(), found)

    run_async(run_)


async def find_jobs(service: Service, wanted: JobsWanted) -> Jobs:
    """By the broker; where none serves the folder, by the journal."""
    if is_served_now(service):
        return await ask(service, ListJobs(wanted), Jobs)

    def read() -> Jobs:
        with looking(service.data) as store:
            found, total = waiting(store, wanted)
        return Jobs(time.time(), total, found, is_served=False)

    return await to_thread.run_sync(read)


def print_jobs(console: Console, found: Jobs) -> None:
    """A table for each tenant; requests of a run stand together."""
    if not found.is_served:
        console.print("No broker serves this data. Its journal holds:", soft_wrap=True)
    for tenant, of_tenant in groupby(sorted(found.jobs, key=lambda job: job.tenant), key=lambda job: job.tenant):
        console.print(jobs_table(tenant, list(of_tenant), found.at, console.width))
    left = found.total - len(found.jobs)
    console.print(f"{found.total:,} not over" + (f", {left:,} of them not shown: --limit shows more." if left else "."))


def jobs_table(title: str, found: Sequence[Job], at: float, width: int) -> Table:
    first = {job.lane: i for i, job in reversed(list(enumerate(found)))}
    ordered = sorted(found, key=lambda job: first[job.lane])  # stable: each run's stay in their order
    return table(
        ("request", "why it is not over"), [_cells(job, at) for job in ordered], title, {"request": ONE_RUN}, width
    )


def _cells(job: Job, at: float) -> tuple[str, str]:
    what = f"{job.kind}, {job.tokens:,} tokens\naccepted {lasting(at - job.accepted_at)} ago"
    of = "" if job.run in (None, job.lane) else f"\nof {job.run}"
    state = "" if job.state == "active" else f"{job.state}: "
    return f"{job.future}{of}\n{what}", f"{state}{job.reason}\n{job.base_model}"
