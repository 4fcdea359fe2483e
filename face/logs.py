"""Structured logs on standard error: a line for each event, with ids, and never a secret."""

import io
import logging
import sys
from typing import TextIO, cast

import structlog


class _Lossy(io.TextIOBase):
    """Standard error may be a file on the disk that is full, or a pipe that nobody reads any more: a line that cannot
    be written is lost, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            return


def configure(level: str) -> None:
    """`level` is a name of the logging module's, such as "info" or "warning"."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S"),
            # Others show what was in variables, and so what people train on.
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Lossy(sys.stderr))),
    )
