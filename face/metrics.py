"""`lorry metrics`: a run's numbers, taken away as a file, and brought in from where a loop wrote them."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated

import typer
from anyio import to_thread

from lorry import options
from lorry.calling import run_async
from lorry.client.metric_files import FORMATS, MetricLines, writer_of
from lorry.client.service import connect as connected
from lorry.config import default_data
from lorry.printing import plain_console
from lorry.service import find_service
from lorry.storage.looking import looking
from lorry.wire.errors import InvalidRequestError, NotFoundError
from lorry.wire.ids import RunId
from lorry.wire.metrics import in_messages

metrics = typer.Typer(name="metrics", help="Numbers of a run, step by step.", no_args_is_help=True)

Format = StrEnum("Format", list(FORMATS))
Run = Annotated[str, typer.Argument(help="The run's id")]
LogFile = Annotated[
    Path, typer.Argument(help="An object a line: a step, and numbers beside it", exists=True, dir_okay=False)
]
ApiKey = Annotated[str | None, typer.Option(envvar="LORRY_API_KEY", help="A key of the run's tenant")]


@metrics.command("export")
def export_metrics(
    run: Run,
    form: Annotated[Format, typer.Option("--format", help="json, csv, jsonl or parquet")] = Format["csv"],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new file [default: standard output]")] = None,
    api_key: ApiKey = None,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Write all numbers of a run: with a key, as the broker has them; without one, as the data folder has."""

    async def work() -> None:
        if api_key is None and connect is not None:
            raise InvalidRequestError.of("api-key", None, "a key of the run's tenant, to ask a broker that is named")
        if api_key is None:
            await to_thread.run_sync(_export_from_folder, data or default_data(), run, form.value, output)
            return
        service = find_service(connect, server_key, data)
        async with connected(service.address, api_key=api_key, server_key=service.server_key) as client:
            rest = client.create_rest_client()
            writer = writer_of(form.value, await rest.list_metric_names_async(run))
            with _written(output) as file:
                file.write(writer.begin())
                async for points in rest.run_metrics_pages(run):
                    file.write(writer.add(points))
                file.write(writer.end())

    run_async(work)


@metrics.command("import")
def import_metrics(
    run: Run,
    file: Annotated[
        Path, typer.Argument(help="An object a line: a step, and numbers beside it", exists=True, dir_okay=False)
    ],
    api_key: ApiKey = None,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Log what a loop wrote, tinker-cookbook's metrics.jsonl among others, as the run's numbers. What is no number is
    left out, and told."""

    async def work() -> None:
        if api_key is None:
            raise InvalidRequestError.of("api-key", None, "a key of the run's tenant, or $LORRY_API_KEY")
        service = find_service(connect, server_key, data)
        read, steps, values = MetricLines(), set[int](), 0
        async with connected(service.address, api_key=api_key, server_key=service.server_key) as client:
            rest = client.create_rest_client()
            with file.open(encoding="utf-8", errors="replace") as lines:
                for points in in_messages(read.points(lines)):
                    await rest.log_run_metrics_async(run, points)
                    steps.update(point.step for point in points)
                    values += sum(len(point.values) for point in points)
        console = plain_console()
        console.print(f"Logged {values:,} numbers of {len(steps):,} steps of {run}.", soft_wrap=True)
        for left_out in read.told():
            console.print(f"Left out {left_out}.", soft_wrap=True, markup=False)

    run_async(work)


def _export_from_folder(data: Path, run: str, form: str, output: Path | None) -> None:
    with looking(data) as store:
        if not store.rows("SELECT 1 FROM runs WHERE id = ?", run):
            raise NotFoundError(f"there is no run {run!r}", field="run")
        writer = writer_of(form, store.metric_names_of(RunId(run)))
        with _written(output) as file:
            file.write(writer.begin())
            after = None
            while True:
                page = store.run_metrics(RunId(run), after, 1000)
                file.write(writer.add(page.points))
                if (after := page.next) is None:
                    break
            file.write(writer.end())


@contextmanager
def _written(output: Path | None) -> Generator[IO[bytes]]:
    """A new file, or standard output. Raises InvalidRequestError for one that exists or cannot be written."""
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with output.open("xb") as file:
            yield file
    except OSError as error:
        expected = f"a new file that can be written ({error.strerror})"
        raise InvalidRequestError.of("output", str(output), expected) from error
