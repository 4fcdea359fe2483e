"""`lorry checkpoints`: which there are of all tenants, and what an operator changes of them."""

import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from anyio import to_thread
from rich.console import Console

from lorry import options
from lorry.administration import ask, changing, is_served_now
from lorry.calling import call, run_async
from lorry.config import default_data
from lorry.printing import plain_console
from lorry.scheduler.checkpoints import changes_of, not_there, recorded
from lorry.scheduler.registry import no_checkpoint
from lorry.selection import Selection, seconds_of, selected
from lorry.service import Service, find_service
from lorry.storage.audit import OPERATOR
from lorry.storage.checkpoints import delete_folder, place_of
from lorry.storage.lock import sole_writer
from lorry.storage.looking import looking
from lorry.storage.rows import CheckpointKind, CheckpointRow
from lorry.storage.store import Store
from lorry.tables import ONE_RUN, AsJson, day, print_json, print_table
from lorry.wire.admin_messages import (
    NAMES_AT_ONCE,
    CheckpointOrder,
    Chosen,
    LimitCheckpoints,
    RemoveCheckpoints,
    ShareCheckpoints,
)
from lorry.wire.limits import TTL_AT_MOST_S
from lorry.wire.words import lasting, size

checkpoints = typer.Typer(
    name="checkpoints", help="Checkpoints of all tenants, and how long they stay.", no_args_is_help=True
)

Kind = StrEnum("Kind", list(get_args(CheckpointKind)))


def _duration(text: str) -> float:
    try:
        return seconds_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Paths = Annotated[list[str], typer.Argument(help="As `lorry checkpoints ls` shows them", metavar="PATH...")]
Tenant = Annotated[str | None, typer.Option(help="Only this tenant's")]
Run = Annotated[str | None, typer.Option(help="Only this run's")]
OfKind = Annotated[Kind | None, typer.Option("--kind", help="Only of this kind")]
OlderThan = Annotated[
    float | None, typer.Option(parser=_duration, metavar="DURATION", help="Only those made before: 12h or 30d ago")
]


@checkpoints.command("ls")
def list_checkpoints(
    tenant: Tenant = None,
    run: Run = None,
    kind: OfKind = None,
    older_than: OlderThan = None,
    as_json: AsJson = False,
    data: options.Data = None,
) -> None:
    """Print checkpoints that have names, newest first, and what they take together."""

    def show() -> None:
        found = found_in(data or default_data(), _selection(tenant, run, kind, older_than))
        if as_json:
            print_json(found)
        else:
            print_checkpoints(plain_console(), found)

    call(show)


@checkpoints.command("rm")
def remove(
    paths: Annotated[list[str] | None, typer.Argument(help="As `lorry checkpoints ls` shows them")] = None,
    tenant: Tenant = None,
    run: Run = None,
    kind: OfKind = None,
    older_than: OlderThan = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Delete checkpoints: those at PATHS, or all that the options mean. It asks before.

    What a run is rebuilt from, and what a sampler samples, stays until it is needed no more.
    """
    wanted = _selection(tenant, run, kind, older_than)
    if bool(paths) == (wanted != Selection()):
        raise typer.BadParameter("give paths, or at least one of --tenant, --run, --kind and --older-than")

    async def run_() -> None:
        service = find_service(connect, server_key, data)
        found = await to_thread.run_sync(_chosen, service.data, wanted, paths or [])
        if not found:
            plain_console().print("There are none.")
            return
        if not yes:
            print_checkpoints(plain_console(), found)
            typer.confirm(f"Delete {_counted(found)}?", abort=True)
        await _change(service, found, RemoveCheckpoints, "deleted")

    run_async(run_)


@checkpoints.command("ttl")
def limit(
    paths: Paths,
    in_: Annotated[
        float | None,
        typer.Option("--in", parser=_duration, metavar="DURATION", help="When they go: 12h or 30d from now"),
    ] = None,
    never: Annotated[bool, typer.Option("--never", help="Keep them")] = False,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Say when the checkpoints at PATHS go, or that they do not."""
    if never == (in_ is not None):
        raise typer.BadParameter("give --in, or --never")
    if in_ is not None and not 1 <= in_ <= TTL_AT_MOST_S:
        raise typer.BadParameter("is from one second to a hundred years", param_hint="--in")
    ttl = None if in_ is None else round(in_)
    done = "stay" if in_ is None else f"go in {lasting(in_)}"
    _change_at(
        paths, partial(LimitCheckpoints, ttl_seconds=ttl), done, partial(find_service, connect, server_key, data)
    )


@checkpoints.command("publish")
def publish(
    paths: Paths,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Let every tenant who knows its path load, sample, copy and download a checkpoint."""
    find = partial(find_service, connect, server_key, data)
    _change_at(paths, partial(ShareCheckpoints, public=True), "public", find)


@checkpoints.command("unpublish")
def unpublish(
    paths: Paths,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Keep checkpoints to their tenant. What others have copied, or sample already, they keep."""
    find = partial(find_service, connect, server_key, data)
    _change_at(paths, partial(ShareCheckpoints, public=False), "their tenant's alone", find)


def found_in(data: Path, wanted: Selection) -> list[CheckpointRow]:
    with looking(data) as store:
        return selected(store.checkpoints(), wanted, time.time())


def print_checkpoints(console: Console, found: Sequence[CheckpointRow]) -> None:
    if found:
        columns = ("path, tenant", "kind", "age", "expires")
        print_table(columns, map(_cells, found), least={"path, tenant": ONE_RUN}, console=console)
    console.print(f"{_counted(found)}.")


def _cells(row: CheckpointRow) -> tuple[str, ...]:
    expires = day(row.expires_at) + ("\npublic" if row.public else "")
    return (
        f"{row.path}\n{row.tenant}",
        f"{row.kind}\n{size(row.size_bytes)}",
        lasting(time.time() - row.created_at),
        expires,
    )


def _counted(found: Sequence[CheckpointRow]) -> str:
    named = "1 checkpoint" if len(found) == 1 else f"{len(found):,} checkpoints"
    return f"{named}, {size(sum(row.size_bytes for row in found))}"


def _selection(tenant: str | None, run: str | None, kind: Kind | None, older_than: float | None) -> Selection:
    return Selection(tenant, run, None if kind is None else cast("CheckpointKind", kind.value), older_than)


def _chosen(data: Path, wanted: Selection, paths: Sequence[str]) -> list[CheckpointRow]:
    """Raises NotFoundError for a path that leads nowhere: then nothing is changed."""
    found = found_in(data, wanted)
    if not paths:
        return found
    by_path = {row.path: row for row in found}
    for path in paths:
        if path not in by_path:
            raise no_checkpoint(path)
    return [by_path[path] for path in dict.fromkeys(paths)]


def _change_at(
    paths: Sequence[str], order: Callable[[list[Chosen]], CheckpointOrder], done: str, find: Callable[[], Service]
) -> None:
    async def run() -> None:
        service = find()
        found = await to_thread.run_sync(_chosen, service.data, Selection(), paths)
        await _change(service, found, order, done)

    run_async(run)


async def _change(
    service: Service, found: Sequence[CheckpointRow], order: Callable[[list[Chosen]], CheckpointOrder], done: str
) -> None:
    """By the broker, where one serves the folder; else in the folder, which no broker can come to serve meanwhile."""
    gone: list[str] = []
    for start in range(0, len(found), NAMES_AT_ONCE):
        asked = order([Chosen(row.path, row.created_at) for row in found[start : start + NAMES_AT_ONCE]])
        if is_served_now(service):
            gone += await ask(service, asked, list[str])
        else:
            gone += await to_thread.run_sync(change_in_folder, service.data, asked)
    console = plain_console()
    for row in found:
        console.print(f"{row.path}: {'was there no more' if row.path in gone else done}.", soft_wrap=True)


def change_in_folder(data: Path, order: CheckpointOrder) -> list[str]:
    """The paths of those that are not there. A broker reads all names when it starts, and deletes what none leads to;
    none starts meanwhile. Raises InvalidRequestError where one has just started."""
    with sole_writer(data):
        with changing(data) as store:
            now = time.time()
            named = {row.path: row for row in selected(store.checkpoints(), Selection(), now)}
            changes = changes_of(order, named.get, now, OPERATOR)
            gone = recorded(store, changes)
        with looking(data) as store:
            _delete(data / "checkpoints", store, [before.folder for before, after, _ in changes if after is None])
    return [*not_there(order, changes), *gone]


def _delete(root: Path, store: Store, folders: Sequence[str]) -> None:
    """What nothing needs, which nothing can come to need."""
    for folder in folders:
        if not store.folder_is_in_use(folder):
            delete_folder(root, root.joinpath(*place_of(Path(folder))))
