"""What is counted and traced of a command's life, stage after stage."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lorry.actors.spans import Spans as ActorSpans
from lorry.client.connection import open_connection
from lorry.scheduler.observing.counts import Counts
from lorry.scheduler.observing.spans import Spans
from lorry.scheduler.observing.stages import Stages
from lorry.scheduler.observing.unsaved import Unsaved
from lorry.storage.rows import CommandRow, Execution
from lorry.wire.actor_messages import Completion, Item, Outcome
from lorry.wire.client_messages import CommandArguments, CreateRun, RunCreated, Submit
from lorry.wire.errors import ErrorInfo, LorryError
from lorry.wire.ids import ActorId, BatchId, FutureId, LaneId, TenantId, future_id
from lorry.wire.tracing import Tracing
from lorry.wire.types import LoraConfig

from .test_client_door import Serving

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
A, B = ActorId("a"), ActorId("b")
FUTURE = FutureId("run-1:0")
ROW = CommandRow(
    FUTURE, LaneId("run-1"), 0, "forward", TenantId("alice"), "m", 5, 1, CommandArguments(), accepted_at=10.0,
    traceparent=PARENT,
)  # fmt: skip


class Clock:
    now = 10.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("lorry.wire.tracing._provider", lambda process: provider)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    return exporter


@pytest.fixture
def tracing(exported: InMemorySpanExporter) -> Tracing:
    tracing = Tracing()
    assert tracing.start("test") is None
    return tracing


def shown(exported: InMemorySpanExporter) -> list[tuple[str, object]]:
    return [(span.name, dict(span.attributes or {}).get("error.type")) for span in exported.get_finished_spans()]


def traceparent(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"


def test_a_command_that_is_handed_out_twice_waits_and_is_executed_twice(
    exported: InMemorySpanExporter, tracing: Tracing
) -> None:
    counts, clock = Counts(), Clock()
    stages = Stages(counts, Spans(tracing, clock), clock)
    stages.accepted(ROW)
    first = stages.handed_out(ROW, A)
    stages.actor_lost(B)
    stages.actor_lost(A)
    second = stages.handed_out(ROW, B)
    stages.used(ROW, {"prefill": 5})
    execution = stages.ended(ROW, "done", 0.5)
    assert execution == Execution(11.0, 2, 0.5)
    assert shown(exported) == [("queue", None), ("execute", "ActorLost"), ("queue", None), ("execute", None)]
    spans = exported.get_finished_spans()
    assert [traceparent(span) for span in spans if span.name == "execute"] == [first, second]
    assert {span.parent and f"{span.parent.span_id:016x}" for span in spans} == {"b7ad6b7169203331"}
    ends, starts = [span.end_time for span in spans[:-1]], [span.start_time for span in spans[1:]]
    assert ends == starts, "it is in one of its stages, whenever"
    text = {sample.name: sample.value for family in counts.registry.collect() for sample in family.samples}
    assert text["lorry_commands_handed_out_again_total"] == 1
    assert text["lorry_command_queue_seconds_count"] == text["lorry_command_seconds_count"] == 1


def test_the_parts_of_a_command_are_of_one_execution(exported: InMemorySpanExporter, tracing: Tracing) -> None:
    clock = Clock()
    stages = Stages(Counts(), Spans(tracing, clock), clock)
    stages.accepted(ROW)
    parents = [stages.handed_out(ROW, actor, in_part=True) for actor in (A, A, B, A)]
    execution = stages.ended(ROW, "failed", error="OutOfMemoryError")
    assert len(set(parents)) == 1
    assert execution == Execution(11.0, 1)
    assert shown(exported) == [("queue", None), ("execute", "OutOfMemoryError")]


def test_what_was_never_handed_out_has_no_execution(exported: InMemorySpanExporter, tracing: Tracing) -> None:
    clock = Clock()
    stages = Stages(Counts(), Spans(tracing, clock), clock)
    stages.accepted(ROW)
    assert stages.ended(ROW, "failed", error="CommandCancelledError") is None
    assert shown(exported) == [("queue", "CommandCancelledError")]


def test_commands_that_share_a_pass_have_spans_of_their_own(exported: InMemorySpanExporter, tracing: Tracing) -> None:
    spans = ActorSpans(tracing, "m")
    items = [Item(FutureId(f"run-{i}:0"), "forward", None, traceparent=PARENT) for i in range(3)]
    spans.trained([*items, Item(FutureId("run-4:0"), "forward", None)])  # which nobody traces
    alone = Item(FutureId("run-5:0"), "forward", None, traceparent=PARENT)
    error = ErrorInfo("NonFiniteError", "it is not finite")
    ends = [Outcome(item.future, error if item is items[1] else None, prefill_tokens=3) for item in items]
    spans.told(Completion(BatchId(1), ends, done=True))
    spans.trained([alone])
    spans.told(Completion(BatchId(2), [Outcome(alone.future)], done=True))
    told = exported.get_finished_spans()
    assert [dict(span.attributes or {})["lorry.pass"] for span in told] == [1, 1, 1, 2]
    assert [dict(span.attributes or {})["lorry.pass.commands"] for span in told] == [4, 4, 4, 1]
    assert shown(exported) == [("execute", None), ("execute", "NonFiniteError"), ("execute", None), ("execute", None)]
    assert len({traceparent(span) for span in told}) == 4


async def test_a_span_that_is_none_is_refused_under_its_seq_and_the_run_goes_on(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as alice:
        service.may_work.set()
        run = LaneId((await alice.ask(CreateRun(alice.next_request(), "n", "m", LoraConfig(rank=4)), RunCreated)).run)
        for seq, parent in enumerate(("nonsense", PARENT + "0", PARENT)):
            future = alice.expect(future_id(run, seq))
            submit = Submit(alice.next_request(), run, seq, "optim_step", traceparent=parent)
            alice.submit(submit, b"", future)
            if parent == PARENT:
                await future
            else:
                with pytest.raises(LorryError, match="traceparent"):
                    await future
        assert service.states(run) == ["failed", "failed", "done"]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.integers(0, 3))))
def test_what_is_not_saved_is_known_and_since_when(events: list[tuple[str, bool, int]]) -> None:
    """Beside a list of all that changed and is not saved."""
    unsaved, changes, seqs, newest = Unsaved(), list[tuple[str, int, float]](), {"a": -1, "b": -1}, None
    for at, (run, is_change, behind) in enumerate(events):
        if is_change:
            seqs[run] += 1
            unsaved.changed(LaneId(run), seqs[run], float(at))
            changes.append((run, seqs[run], float(at)))
        else:
            unsaved.saved(LaneId(run), seqs[run] - behind, float(at))
            newest = float(at)
            changes = [each for each in changes if each[0] != run or each[1] > seqs[run] - behind]
        assert len(unsaved) == len({each[0] for each in changes})
        assert unsaved.newest_save_at == newest
        oldest = min((each[2] for each in changes), default=None)
        found = unsaved.oldest_at()
        assert (found is None) == (oldest is None)
        assert oldest is None or (found is not None and oldest <= found <= at)
