"""The broker's spans of a command: `queue` until it is handed out, `execute` while an actor has it, in turns where it
is handed out again. Each is a child of what asked for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...storage.rows import CommandRow
from ...wire.ids import ActorId, FutureId
from ...wire.tracing import Span, Tracing
from ...wire.types import UsageKind


@dataclass(slots=True)
class _Open:
    """`actor` None: it waits."""

    row: CommandRow
    span: Span
    actor: ActorId | None = None


class Spans:
    """Does nothing where there is no tracing."""

    def __init__(self, tracing: Tracing, now: Callable[[], float]) -> None:
        self._tracing, self._now = tracing, now
        self._open: dict[FutureId, _Open] = {}

    def accepted(self, row: CommandRow) -> None:
        if self._tracing.is_on:
            self._begin(row, "queue", row.accepted_at)

    def handed_out(self, row: CommandRow, actor: ActorId, *, in_part: bool = False) -> str | None:
        """What the actor's own span is to be a child of: those of a command's parts are of one."""
        if not self._tracing.is_on:
            return None
        now, before = self._now(), self._open.get(row.future)
        if before is not None:
            if before.actor is not None and in_part:
                return before.span.traceparent
            before.span.end(None if before.actor is None else "taken_back", now)
        return self._begin(row, "execute", now, actor).span.traceparent

    def actor_lost(self, actor: ActorId) -> None:
        """What it had waits again."""
        for open_ in [each for each in self._open.values() if each.actor == actor]:
            now = self._now()
            open_.span.end("ActorLost", now)
            self._begin(open_.row, "queue", now)

    def used(self, row: CommandRow, tokens: Mapping[UsageKind, int]) -> None:
        if open_ := self._open.get(row.future):
            open_.span.note({f"lorry.tokens.{kind}": count for kind, count in tokens.items()})

    def ended(self, row: CommandRow, error: str | None) -> None:
        if open_ := self._open.pop(row.future, None):
            open_.span.end(error, self._now())

    def _begin(self, row: CommandRow, name: str, at: float, actor: ActorId | None = None) -> _Open:
        attributes = {"lorry.model": row.base_model, "lorry.kind": row.kind, "lorry.request": str(row.future)}
        if actor is not None:
            attributes["lorry.actor"] = str(actor)
        span = self._tracing.begin(name, row.traceparent, attributes=attributes, at=at)
        assert span is not None, "tracing is on"
        open_ = self._open[row.future] = _Open(row, span, actor)
        return open_
