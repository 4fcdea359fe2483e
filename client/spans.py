"""The client's spans: one for each command, from the call until its result is there."""

from typing import Any

from msgspec import structs

from ..wire.client_messages import Submit
from ..wire.tracing import tracing
from .futures import Future


def traced(command: Submit, future: Future[Any]) -> Submit:
    """With a span that ends when the future does, where traces are wanted."""
    attributes = {"lorry.kind": command.kind, "lorry.request": str(future.id)}
    if (span := tracing.begin(f"lorry.{command.kind}", kind="client", attributes=attributes)) is None:
        return command
    future.on_end = lambda error: span.end(None if error is None else type(error).__name__)
    return structs.replace(command, traceparent=span.traceparent)
