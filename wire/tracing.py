"""Spans for OpenTelemetry, one trace a command through all processes. Without OTEL_EXPORTER_OTLP_ENDPOINT there are
none, no package of OpenTelemetry's is imported, and `begin` returns None.

Attributes are kinds, models, counts and ids: never a prompt, a key or what a user wrote.
"""

import os
import re
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan

_FORM = r"^00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$"
Traceparent: TypeAlias = Annotated[str, msgspec.Meta(max_length=55, pattern=_FORM)]
"""Which trace, and which span of it is the parent, as W3C writes it."""
Attributes: TypeAlias = Mapping[str, str | int | float | bool]
Kind: TypeAlias = Literal["internal", "server", "client"]
_NONE: Attributes = {}
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

_current: ContextVar[str | None] = ContextVar("traceparent", default=None)


class Span:
    """Of one operation. It counts once it has ended."""

    def __init__(self, span: "OtelSpan") -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        of = self._span.get_span_context()
        return f"00-{of.trace_id:032x}-{of.span_id:016x}-{of.trace_flags:02x}"

    def name(self, name: str) -> None:
        self._span.update_name(name)

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(dict(attributes))

    def end(self, error: str | None = None, at: float | None = None) -> None:
        """`at` is in Unix seconds; `error` the class of what went wrong."""
        from opentelemetry.trace import StatusCode

        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end(None if at is None else _nanoseconds(at))


class Tracing:
    """Of one process."""

    def __init__(self) -> None:
        self._provider: TracerProvider | None = None
        self._tried = False

    @property
    def is_on(self) -> bool:
        return self._provider is not None

    def start(self, process: str) -> str | None:
        """By the environment, the first time that it is called. Returns what keeps spans from being sent although they
        are wanted, for its user to know."""
        if self._tried:
            return None
        self._tried = True
        if not is_wanted(os.environ):
            return None
        protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "http/protobuf")
        if protocol != "http/protobuf":
            return f"no traces are sent: OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, expected http/protobuf"
        try:
            self._provider = _provider(process)
        except ImportError as error:
            wanted = "`pip install lorry[otel]` installs what sends them"
            return f"no traces are sent though OTEL_EXPORTER_OTLP_ENDPOINT is set: {error}; {wanted}"
        return None

    def begin(
        self,
        name: str,
        parent: str | None = None,
        kind: Kind = "internal",
        attributes: Attributes = _NONE,
        at: float | None = None,
    ) -> Span | None:
        """Without a `parent` it is a child of the program's own current span, or begins a trace. `at` is in Unix
        seconds."""
        if self._provider is None:
            return None
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
        return Span(
            self._provider.get_tracer("lorry").start_span(
                name,
                context,
                SpanKind[kind.upper()],
                dict(attributes),
                start_time=_nanoseconds(time.time() if at is None else at),
            )
        )

    def flush(self) -> None:
        """Send what has ended; the end of the process does so, too."""
        if self._provider is not None:
            self._provider.force_flush()


tracing = Tracing()


def is_wanted(environment: Mapping[str, str]) -> bool:
    """By OpenTelemetry's standard variables."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporters = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    return "otlp" in exporters.split(",") and any(environment.get(name) for name in _ENDPOINTS)


def understood(header: str | None) -> str | None:
    """A `traceparent` header that is one; whoever sends another is told nothing, and begins a trace."""
    return header if header is not None and re.fullmatch(_FORM, header) else None


def current() -> str | None:
    """Of the request that is being answered here."""
    return _current.get()


@contextmanager
def within(traceparent: str) -> Generator[None]:
    before = _current.set(traceparent)
    try:
        yield
    finally:
        _current.reset(before)


def _provider(process: str) -> "TracerProvider":
    """It sends what has ended in batches, from a thread, and the rest when the process ends."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named: dict[str, str] = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": process}
    provider = TracerProvider(resource=Resource.create({"lorry.process": process, **named}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _nanoseconds(at: float) -> int:
    return round(at * 1e6) * 1000
