"""When a command passes from one stage of its life to the next: kept while it is open, and counted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...storage.rows import CommandRow, Execution
from ...wire.ids import ActorId, FutureId
from ...wire.types import UsageKind
from .counts import Counts, Ended
from .spans import Spans


@dataclass(slots=True)
class _HandedOut:
    at: float
    times: int = 1


class Stages:
    """`now` is in Unix seconds, as the journal's times are."""

    def __init__(self, counts: Counts, spans: Spans, now: Callable[[], float]) -> None:
        self._counts, self._spans, self._now = counts, spans, now
        self._handed_out: dict[FutureId, _HandedOut] = {}

    def accepted(self, row: CommandRow) -> None:
        """It waits from now on."""
        self._spans.accepted(row)

    def handed_out(self, row: CommandRow, actor: ActorId, *, in_part: bool = False) -> str | None:
        """To an actor; `in_part` to one of several, which are one time together. Returns the span that the actor's is
        to be a child of."""
        if (before := self._handed_out.get(row.future)) is None:
            now = self._now()
            self._handed_out[row.future] = _HandedOut(now)
            self._counts.took("queue", row.kind, now - row.accepted_at)
        elif not in_part:
            before.times += 1
            self._counts.handed_out_again(row.base_model)
        return self._spans.handed_out(row, actor, in_part=in_part)

    def actor_lost(self, actor: ActorId) -> None:
        self._spans.actor_lost(actor)

    def used(self, row: CommandRow, tokens: Mapping[UsageKind, int]) -> None:
        self._counts.used(row.base_model, tokens)
        self._spans.used(row, tokens)

    def refused(self, row: CommandRow) -> None:
        """It failed under its seq, and nobody was to execute it."""
        self._counts.finished(row.base_model, row.kind, "failed")

    def ended(
        self, row: CommandRow, state: Ended, device_s: float | None = None, error: str | None = None
    ) -> Execution | None:
        """It is over, `error` the class of what was wrong: what is to be written of its execution, None where no actor
        was given it."""
        self._spans.ended(row, error)
        now, handed_out = self._now(), self._handed_out.pop(row.future, None)
        self._counts.finished(row.base_model, row.kind, state)
        self._counts.took("total", row.kind, now - row.accepted_at)
        if handed_out is None:
            return None
        self._counts.took("execution", row.kind, now - handed_out.at)
        return Execution(handed_out.at, handed_out.times, device_s)
