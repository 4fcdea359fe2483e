"""The actor's spans: `execute`, one for each command that it was given, however many share a pass.

They end when the broker is told of the command's end. What an actor had that died is told by none.
"""

from collections.abc import Iterable, Sequence

from ..wire.actor_messages import Completion, FromActor, Item, Outcome
from ..wire.ids import FutureId
from ..wire.tracing import Span, Tracing


class Spans:
    """Of the compute thread. Does nothing where there is no tracing, nor for commands that nobody traces."""

    def __init__(self, tracing: Tracing, base_model: str) -> None:
        self._tracing, self._base_model, self._passes = tracing, base_model, 0
        self._open: dict[FutureId, Span] = {}

    def trained(self, items: Sequence[Item]) -> None:
        """A pass begins, of all these."""
        if self._tracing.is_on:
            self._passes += 1
            self._begin(items, {"lorry.pass": self._passes, "lorry.pass.commands": len(items)})

    def sampled(self, item: Item) -> None:
        """It may join the decode loop from now on."""
        if self._tracing.is_on:
            self._begin((item,), {})

    def told(self, message: FromActor) -> None:
        if self._open and isinstance(message, Completion):
            for outcome in message.outcomes:
                self._end(outcome)

    def _begin(self, items: Iterable[Item], shared: dict[str, int]) -> None:
        for item in items:
            if item.traceparent is None:
                continue
            attributes = {"lorry.model": self._base_model, "lorry.kind": item.kind, **shared}
            if item.share is not None:
                attributes["lorry.share"] = item.share.stage
            if span := self._tracing.begin("execute", item.traceparent, attributes=attributes):
                self._open[item.future] = span

    def _end(self, outcome: Outcome) -> None:
        if (span := self._open.pop(outcome.future, None)) is None:
            return
        tokens = {
            "prefill": outcome.prefill_tokens - outcome.cached_prefill_tokens,
            "cached_prefill": outcome.cached_prefill_tokens,
            "sample": outcome.sample_tokens,
            "train": outcome.train_tokens,
        }
        span.note({f"lorry.tokens.{kind}": count for kind, count in tokens.items() if count})
        if outcome.device_s is not None:
            span.note({"lorry.device_s": outcome.device_s})
        span.end(outcome.error and outcome.error.code)
