"""`lorry bench`: measures a server by a workload, and compares what two measurements found."""

import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import typer

from lorry import options
from lorry.actors.config import ActorSettings
from lorry.calling import run_async
from lorry.printing import plain_console
from lorry.wire.errors import InvalidRequestError

if TYPE_CHECKING:
    from lorry.bench.drive import Server
    from lorry.bench.records import Record
    from lorry.bench.workload import Workload

app = typer.Typer(help="Measure a server by a workload; compare two measurements.", no_args_is_help=True)


@app.command()
@options.with_actor_settings
def run(
    workload: Annotated[Path, typer.Argument(help="A TOML file; docs/benchmarking.md says what is in it")],
    server: Annotated[
        str | None,
        typer.Option(help="tcp://HOST:PORT of a Lorry, or http(s)://… of any server of the Tinker API"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Without --server: NAME=PATH_OR_HUB_ID, served for as long as it is measured")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help='TOML, TENANT = "KEY" [default: $LORRY_API_KEY, for all tenants]')
    ] = None,
    server_key: options.ServerKey = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; two or more tell how sure the figures are")] = 1,
    out: Annotated[Path | None, typer.Option(help="A folder [default: bench-results/NAME-TIME]")] = None,
    *,
    settings: ActorSettings,
) -> None:
    """Run a workload, print what came of it, and write every request's times, totals and a page of plots."""
    _require_extras()
    from lorry.bench import tables
    from lorry.bench.keys import read_keys
    from lorry.bench.run import run as run_workload
    from lorry.bench.totals import facts_of
    from lorry.bench.workload import parse_workload

    console = plain_console()

    async def measure() -> None:
        wanted = parse_workload(await _text_of(workload))
        known = read_keys(keys, os.environ.get("LORRY_API_KEY"))
        began_at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        folder = out or Path("bench-results", f"{wanted.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        facts = await anyio.to_thread.run_sync(facts_of, server or f"Lorry, embedded, {model}", began_at)
        with console.status("Connecting…") as status:
            ended = _Ended(lambda line: status.update(line))
            async with _server(wanted, server, model, known, server_key, settings) as chosen:
                totals = await run_workload(wanted, chosen, facts, folder, repeats, ended.begin, ended.tell)
        for number, figures in enumerate(totals.runs, 1):
            console.print(tables.of_run(f"{wanted.name}, run {number} of {repeats}", figures))
        if repeats > 1:
            console.print(tables.of_estimates(totals))
        console.print(f"In {folder}: requests-*.jsonl, totals.json, page.html.", soft_wrap=True)

    run_async(measure)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A totals.json, or the folder that has it")],
    after: Annotated[Path, typer.Argument(help="Another")],
) -> None:
    """Print what changed from one measurement to another, and whether it is more than their noise."""
    _require_extras()
    from lorry.bench import tables
    from lorry.bench.compare import changes, differences_of_setting
    from lorry.bench.totals import read_totals

    async def show() -> None:
        console = plain_console()
        files = [path / "totals.json" if await anyio.Path(path).is_dir() else path for path in (before, after)]
        sides = [await anyio.to_thread.run_sync(read_totals, file) for file in files]
        console.print(tables.of_changes(changes(*sides)))
        for difference in differences_of_setting(*sides):
            console.print(f"Beside that, {difference}.", soft_wrap=True)

    run_async(show)


class _Ended:
    """How many requests have, while it runs."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._run, self._well, self._failed = say, 0, 0, 0

    def begin(self, run: int) -> None:
        self._run, self._well, self._failed = run, 0, 0
        self._show()

    def tell(self, record: "Record") -> None:
        self._well += record.error is None
        self._failed += record.error is not None
        self._show()

    def _show(self) -> None:
        self._say(f"Run {self._run}: {self._well} requests ended, {self._failed} failed")


@asynccontextmanager
async def _server(
    workload: "Workload",
    server: str | None,
    model: str | None,
    keys: dict[str, str],
    server_key: str | None,
    settings: ActorSettings,
) -> AsyncGenerator["Server"]:
    from lorry.bench.lorry_servers import LorryServer, embedded
    from lorry.bench.tinker_server import TinkerServer

    if server is not None and model is not None:
        raise InvalidRequestError.of("model", model, "none with --server, which serves what it serves")
    if server is None:
        if model is None:
            raise InvalidRequestError.of("model", model, "NAME=PATH_OR_HUB_ID, or a --server to measure")
        async with embedded(model, settings) as chosen:
            if chosen.model != workload.model:
                raise InvalidRequestError.of("model", chosen.model, f"{workload.model}, which the workload names")
            yield chosen
    elif server.startswith("tcp://"):
        yield LorryServer(server, workload.model, keys, server_key)
    elif server.startswith(("http://", "https://")):
        yield TinkerServer(server, workload.model, keys)
    else:
        raise InvalidRequestError.of("server", server, "tcp://HOST:PORT or http(s)://HOST:PORT")


async def _text_of(path: Path) -> str:
    try:
        return await anyio.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"workload: {error}", field="workload") from None


def _require_extras() -> None:
    try:
        import plotly  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import scipy  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error.name} is missing: pip install 'lorry[bench]'") from None
