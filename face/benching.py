"""`lorry bench`: measures a server by a workload, and compares what two measurements found."""

import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import anyio
import msgspec
import typer

from lorry import options
from lorry.actors.config import ActorSettings
from lorry.calling import call, run_async
from lorry.config import ModelConfig, default_data
from lorry.printing import plain_console
from lorry.storage.looking import looking
from lorry.storage.reports import requests_between
from lorry.wire.errors import InvalidRequestError

if TYPE_CHECKING:
    from lorry.bench.drive import Server
    from lorry.bench.records import Record
    from lorry.bench.workload import Workload as Parsed

app = typer.Typer(name="bench", help="Measure a server by a workload; compare two measurements.", no_args_is_help=True)


Workload = Annotated[Path, typer.Argument(help="A TOML file; docs/benchmarking.md says what is in it")]
ServerOption = Annotated[
    str | None,
    typer.Option(
        help="tcp://HOST:PORT of a Lorry, http(s)://… of any server of the Tinker API, or openai+http(s)://…/v1 of one "
        "of OpenAI's completions, which samples alone"
    ),
]
Model = Annotated[
    str | None, typer.Option(help="Without --server: NAME=PATH_OR_HUB_ID, served for as long as it is measured")
]
Keys = Annotated[Path | None, typer.Option(help='TOML, TENANT = "KEY" [default: $LORRY_API_KEY, for all tenants]')]
Out = Annotated[Path | None, typer.Option(help="A folder [default: bench-results/NAME-TIME]")]


@app.command()
@options.with_actor_settings
def run(
    workload: Workload,
    server: ServerOption = None,
    model: Model = None,
    keys: Keys = None,
    server_key: options.ServerKey = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; two or more tell how sure the figures are")] = 1,
    out: Out = None,
    *,
    settings: ActorSettings,
) -> None:
    """Run a workload, print what came of it, and write every request's times, totals and a page of plots."""
    _require_extras()
    from lorry.bench import tables
    from lorry.bench.run import run as run_workload
    from lorry.bench.totals import facts_of

    async def measure() -> None:
        began_at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        facts = await anyio.to_thread.run_sync(facts_of, _told(server, model, settings), began_at)
        async with _measuring(workload, server, model, keys, server_key, out, settings) as m:
            totals = await run_workload(m.workload, m.server, facts, m.folder, repeats, m.ended.begin, m.ended.tell)
        console = plain_console()
        for number, figures in enumerate(totals.runs, 1):
            console.print(tables.of_run(f"{totals.workload.name}, run {number} of {repeats}", figures))
        if repeats > 1:
            console.print(tables.of_estimates(totals))
        for error, message in m.ended.messages.items():
            console.print(f"{error}: {message}", soft_wrap=True)
        console.print(f"In {m.folder}: requests-*.jsonl, totals.json, page.html.", soft_wrap=True)

    run_async(measure)


@app.command()
@options.with_actor_settings
def sweep(
    workload: Workload,
    load: Annotated[list[float], typer.Option(min=0.001, help="Times the workload's rates and concurrency")],
    server: ServerOption = None,
    model: Model = None,
    keys: Keys = None,
    server_key: options.ServerKey = None,
    out: Out = None,
    *,
    settings: ActorSettings,
) -> None:
    """Run a workload at several loads, and say which is the greatest that the server bears."""
    _require_extras()
    from lorry.bench import tables
    from lorry.bench.run import sweep as sweep_loads
    from lorry.bench.sweep import knee_of

    async def measure() -> None:
        async with _measuring(workload, server, model, keys, server_key, out, settings) as m:
            points = await sweep_loads(m.workload, m.server, m.folder, load, m.ended.begin, m.ended.tell)
        console = plain_console()
        knee = knee_of(points)
        console.print(tables.of_sweep(m.workload.name, points, knee))
        if knee is None:
            borne = points[0].is_borne
            say = "Every load was borne: try a greater one." if borne else "Not even the smallest load was borne."
            console.print(say, soft_wrap=True)
        console.print(f"In {m.folder}: requests-*.jsonl, sweep.json.", soft_wrap=True)

    run_async(measure)


@app.command()
def record(
    model: Annotated[str, typer.Argument(help="Public name of a base model")],
    file: Annotated[Path, typer.Argument(help="A new file, .json")],
    minutes: Annotated[float, typer.Option(min=0.01, help="How far back")] = 60.0,
    data: options.Data = None,
) -> None:
    """Write a workload of what a service did of late: the same requests at the same times, of random tokens.

    It may run while the service does. Tenants are numbered, and nothing of what they sent is read.
    """
    from lorry.bench.recording import recorded

    if file.suffix != ".json":
        raise typer.BadParameter("is to end in .json: that is what it will be", param_hint="FILE")

    def write() -> None:
        now = time.time()
        with looking(data or default_data()) as store:
            requests = requests_between(store, model, now - 60 * minutes, now)
        workload = recorded(file.stem, model, requests)
        try:
            with file.open("xb") as new:
                new.write(msgspec.json.format(msgspec.json.encode(workload)))
        except OSError as error:
            raise InvalidRequestError(f"file: {error}", field="file") from None
        count = sum(len(tenant.work) for tenant in workload.tenants)
        plain_console().print(f"{count} requests of {workload.duration_s:.0f} s in {file}.", soft_wrap=True)

    call(write)


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
        self._say, self._what, self._well, self._failed = say, "", 0, 0
        self.messages = dict[str, str]()
        """The first of each kind of error."""

    def begin(self, what: str) -> None:
        self._what, self._well, self._failed = what, 0, 0
        self._show()

    def tell(self, record: "Record") -> None:
        self._well += record.error is None
        self._failed += record.error is not None
        if record.error is not None:
            self.messages.setdefault(record.error, record.message)
        self._show()

    def _show(self) -> None:
        self._say(f"{self._what}: {self._well} requests ended, {self._failed} failed")


@dataclass(frozen=True, slots=True)
class _Measuring:
    workload: "Parsed"
    server: "Server"
    folder: Path
    ended: _Ended


@asynccontextmanager
async def _measuring(
    path: Path,
    server: str | None,
    model: str | None,
    keys: Path | None,
    server_key: str | None,
    out: Path | None,
    settings: ActorSettings,
) -> AsyncGenerator[_Measuring]:
    from lorry.bench.keys import read_keys
    from lorry.bench.workload import parse_workload

    workload = parse_workload(await _text_of(path), is_json=path.suffix == ".json")
    known = await anyio.to_thread.run_sync(read_keys, keys, os.environ.get("LORRY_API_KEY"))
    folder = out or Path("bench-results", f"{workload.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if await anyio.Path(folder).exists():
        raise InvalidRequestError.of("out", str(folder), "a folder that is not there yet, so that no two runs mix")
    with plain_console().status("Connecting…") as status:
        async with _server(workload, server, model, known, server_key, settings) as chosen:
            yield _Measuring(workload, chosen, folder, _Ended(lambda line: status.update(line)))


@asynccontextmanager
async def _server(
    workload: "Parsed",
    server: str | None,
    model: str | None,
    keys: dict[str, str],
    server_key: str | None,
    settings: ActorSettings,
) -> AsyncGenerator["Server"]:
    from lorry.bench.lorry_servers import LorryServer, embedded
    from lorry.bench.openai_server import OpenAIServer
    from lorry.bench.tinker_server import TinkerServer

    if server is not None and model is not None:
        raise InvalidRequestError.of("model", model, "none with --server, which serves what it serves")
    if server is None:
        if model is None:
            raise InvalidRequestError.of("model", model, "NAME=PATH_OR_HUB_ID, or a --server to measure")
        if (name := ModelConfig.parse(model).name) != workload.model:
            raise InvalidRequestError.of("model", name, f"{workload.model}, which the workload names")
        async with embedded(model, settings) as chosen:
            yield chosen
    elif server.startswith("tcp://"):
        yield LorryServer(server, workload.model, keys, server_key)
    elif server.startswith(("http://", "https://")):
        yield TinkerServer(server, workload.model, keys)
    elif server.startswith(("openai+http://", "openai+https://")):
        yield OpenAIServer(server.removeprefix("openai+"), workload.model, keys)
    else:
        raise InvalidRequestError.of("server", server, "tcp://…, http(s)://… or openai+http(s)://…")


def _told(server: str | None, model: str | None, settings: ActorSettings) -> str:
    """What is measured, for files that are handed around: without a name or password that an address may hold."""
    if server is not None:
        parts = urlsplit(server)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    own = [f"{f.name}={value!r}" for f in fields(settings) if (value := getattr(settings, f.name)) != f.default]
    return ", ".join(["Lorry, embedded", str(model), *own])


async def _text_of(path: Path) -> str:
    try:
        return await anyio.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"workload: {error}", field="workload") from None


def _require_extras() -> None:
    try:
        import openai  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import plotly  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import scipy  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error.name} is missing: pip install 'lorry[bench]'") from None
