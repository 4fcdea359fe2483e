"""`lorry trace`: what became of a session's or a run's commands, and when, as a file for Perfetto."""

from pathlib import Path
from typing import Annotated

import typer

from lorry import options
from lorry.calling import call
from lorry.client.session_trace import SUFFIX, SessionTrace
from lorry.config import default_data
from lorry.printing import plain_console
from lorry.storage.looking import looking
from lorry.storage.timelines import owner, timeline
from lorry.wire.errors import InvalidRequestError, NotFoundError


def trace(
    subject: Annotated[str, typer.Argument(metavar="SESSION_OR_RUN", help="A client session's id, or a run's")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new file [default: SESSION_OR_RUN.pftrace]")
    ] = None,
    data: options.Data = None,
) -> None:
    """Write a Perfetto trace of a session or a run: when each of its requests waited, was executed, and where.

    It may run while the service does. https://ui.perfetto.dev shows the file.
    """

    def run() -> None:
        file = output or Path(subject + SUFFIX)
        count = write_trace(data or default_data(), subject, file)
        plain_console().print(f"Wrote {count:,} requests to {file}.", soft_wrap=True)

    call(run)


def write_trace(data: Path, subject: str, file: Path) -> int:
    """How many commands were written. Raises NotFoundError where there is no such session or run, InvalidRequestError
    for a file that exists or cannot be written, and what `looking` raises."""
    count, after = 0, None
    with looking(data) as store:
        if (tenant := owner(store, subject)) is None:
            raise NotFoundError(f"there is no session or run {subject!r}", field="subject")
        try:
            with file.open("xb") as written:
                traced = SessionTrace(written, subject)
                while True:
                    page = timeline(store, tenant, subject, after)
                    traced.add(page.commands)
                    count += len(page.commands)
                    if (after := page.after) is None:
                        return count
        except OSError as error:
            expected = f"a new file that can be written ({error.strerror})"
            raise InvalidRequestError.of("output", str(file), expected) from error
