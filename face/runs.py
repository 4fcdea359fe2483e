"""`lorry runs`: which there are, what of each waits, who has its state, and up to where it is saved."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from anyio import to_thread
from rich.console import Console

from lorry import options
from lorry.administration import ask, is_served_now
from lorry.calling import run_async
from lorry.printing import plain_console
from lorry.service import Service, find_service
from lorry.storage.looking import looking
from lorry.storage.reports import recent_runs
from lorry.tables import ONE_RUN, AsJson, ago, print_json, print_table
from lorry.wire.admin_messages import NAMES_AT_ONCE, FindHomes
from lorry.wire.ids import RunId

RUNS_AT_MOST = 1000


def runs(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's")] = None,
    model: Annotated[str | None, typer.Option(help="Only this base model's")] = None,
    limit: Annotated[int, typer.Option(min=1, max=RUNS_AT_MOST, help="How many: those used last")] = 50,
    as_json: AsJson = False,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Print runs, the one used last first: what waits, which actor has its state, and up to where it is saved."""

    async def run() -> None:
        found = await find_runs(find_service(connect, server_key, data), tenant, model, limit)
        if as_json:
            print_json(found)
        else:
            print_runs(plain_console(), found)

    run_async(run)


async def find_runs(service: Service, tenant: str | None, model: str | None, limit: int) -> list[dict[str, Any]]:
    """By the database, and by the broker, where one serves, each one's `home`: the actor that has its state."""

    def read() -> list[dict[str, Any]]:
        with looking(service.data) as store:
            return recent_runs(store, tenant, model, limit)

    found = await to_thread.run_sync(read)
    homes: dict[str, str] = {}
    if is_served_now(service):
        for start in range(0, len(found), NAMES_AT_ONCE):
            names = [RunId(run["id"]) for run in found[start : start + NAMES_AT_ONCE]]
            homes |= await ask(service, FindHomes(names), dict[str, str])
    return [run | {"home": homes.get(run["id"])} for run in found]


def print_runs(console: Console, found: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    columns = ("run, tenant, model", "state", "last request")
    print_table(columns, map(_cells, found), title, {"run, tenant, model": ONE_RUN, "last request": 10}, console)


def _cells(run: Mapping[str, Any]) -> tuple[str, ...]:
    of = f"{run['id']}\n{run['tenant']}\n{run['base_model']}, rank {run['rank']}"
    return of, _state(run), ago(run["last_request_at"])


def _state(run: Mapping[str, Any]) -> str:
    """A run whose state nobody has is rebuilt when its next request comes."""
    failed = f", {run['failed']:,} failed" if run["failed"] else ""
    saved = "not saved yet" if run["restore_folder"] is None else f"saved to request {run['restore_seq']:,}"
    home = f"\nin {run['home']}" if run.get("home") else ""
    return f"{run['queued']:,} queued, {run['finished']:,} over{failed}{home}\n{saved}, {run['replay_s']:,.1f} s behind"
