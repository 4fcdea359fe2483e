"""One trace a command through all processes, by OpenTelemetry's standard variables; none without them."""

import os
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

import lorry
from lorry.wire import tracing
from tests.conftest import MODEL, Server, children_of, start_server
from tests.gateway.test_requests import a_pass, a_run

from .collector import Collector, Told, collecting

TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADER = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patched.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        server = start_server(tmp_path_factory.mktemp("traced"), "--http", "127.0.0.1:0")
    yield server
    server.stop()


def of(collector: Collector, trace: str, count: int) -> list[Told]:
    """The spans of a trace, once there are so many: who ends first need not tell first."""

    def mine(spans: list[Told]) -> list[Told]:
        return [span for span in spans if span.trace == trace]

    return mine(collector.until(lambda spans: len(mine(spans)) >= count))


def root_of(collector: Collector, request: str) -> Told:
    """The client's own span of a command."""

    def roots(spans: list[Told]) -> list[Told]:
        return [s for s in spans if s.service == "lorry-client" and s.attributes["lorry.request"] == request]

    (root,) = roots(collector.until(lambda spans: bool(roots(spans))))
    return root


def named(spans: list[Told]) -> dict[tuple[str, str], Told]:
    return {(span.service, span.name): span for span in spans}


def test_a_header_of_the_clients_is_the_root_of_spans_in_gateway_broker_and_actor(
    traced: Server, collector: Collector
) -> None:
    key = traced.new_key("alice")
    with httpx.Client(base_url=f"{traced.url}/api/v1", headers={"X-API-Key": key}, timeout=None) as http:
        run = a_run(http)
        sent = http.post("forward_backward", content=a_pass(run, 1), headers={"traceparent": HEADER}).json()
        while http.post("retrieve_future", json={"request_id": sent["request_id"]}).json().get("type") == "try_again":
            pass
        assert http.get("sessions", headers={"traceparent": "nonsense"}).status_code == 200
    spans = named(of(collector, TRACE, 4))
    server, queue = spans["lorry-gateway", "POST /api/v1/forward_backward"], spans["lorry-broker", "queue"]
    handed_out, executed = spans["lorry-broker", "execute"], spans["lorry-actor", "execute"]
    assert len(spans) == 4, spans.keys()
    assert server.parent == "b7ad6b7169203331"
    assert queue.parent == handed_out.parent == server.id
    assert executed.parent == handed_out.id
    assert server.attributes["http.response.status_code"] == 200
    assert (queue.end, handed_out.attributes["lorry.actor"]) == (handed_out.start, f"{MODEL}#0")
    assert handed_out.attributes["lorry.tokens.train"] == executed.attributes["lorry.tokens.train"] > 0
    assert executed.attributes["lorry.model"] == MODEL
    assert executed.attributes["lorry.kind"] == "forward_backward"
    assert executed.attributes["lorry.pass.commands"] == 1
    assert not any(span.failed for span in spans.values())
    assert key.encode() not in b"".join(collector.raw)


async def test_a_clients_call_is_the_root_of_its_spans_each_commands_its_own(
    traced: Server, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands that share a pass have spans of their own, with the pass in them; and one that is executed again, since
    its actor died, has another of the same trace."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    here = tracing.Tracing()
    for module in ("lorry.client.spans", "lorry.client.service"):
        monkeypatch.setattr(f"{module}.tracing", here)
    async with lorry.connect(traced.address, api_key=traced.new_key("bob")) as client:
        assert here.is_on
        training = await client.create_lora_training_client_async(MODEL, rank=4)
        datum = lorry.Datum(
            lorry.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]}
        )  # fmt: skip
        futures = [training.forward_backward([datum], "cross_entropy") for _ in range(2)]
        futures.append(training.optim_step(lorry.AdamParams()))
        for future in futures:
            await future
        here.flush()
        roots = [root_of(collector, future.id) for future in futures]
        assert [root.name for root in roots] == ["lorry.forward_backward"] * 2 + ["lorry.optim_step"]
        assert len({root.trace for root in roots}) == 3
        for root in roots:
            spans = named(of(collector, root.trace, 4))
            assert spans.keys() == {
                ("lorry-client", root.name),
                ("lorry-broker", "queue"),
                ("lorry-broker", "execute"),
                ("lorry-actor", "execute"),
            }
            assert spans["lorry-broker", "execute"].parent == root.id
            assert spans["lorry-actor", "execute"].parent == spans["lorry-broker", "execute"].id

        actor = children_of(traced.process.pid)["actor"]
        os.kill(actor, 19)  # SIGSTOP: what it is given waits there
        again = await training.forward_backward_async([datum], "cross_entropy")
        while not (await client.create_rest_client().list_jobs_async()).jobs[0].reason.startswith("it is being exec"):
            pass
        os.kill(actor, 9)
        await again
        here.flush()
        spans = of(collector, root_of(collector, again.id).trace, 6)
        by_broker = sorted((s for s in spans if s.service == "lorry-broker"), key=lambda span: span.start)
        assert [(span.name, span.failed) for span in by_broker] == [
            ("queue", False),
            ("execute", True),
            ("queue", False),
            ("execute", False),
        ]
        (executed,) = [span for span in spans if span.service == "lorry-actor"]
        assert executed.parent == by_broker[-1].id, "who died says nothing"


def in_a_process(program: str, **environment: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout


def test_without_the_variable_nothing_of_it_is_imported_and_no_span_made() -> None:
    program = (
        "import sys; from lorry.wire.tracing import tracing; import lorry.client, lorry.scheduler.broker\n"
        "assert tracing.start('x') is None and not tracing.is_on and tracing.begin('y') is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    assert in_a_process(program).strip() == "[]"


def test_where_the_package_is_missing_it_is_said() -> None:
    program = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from lorry.wire.tracing import tracing; print(tracing.start('x')); print(tracing.start('x'))"
    )
    said, again = in_a_process(program, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1").splitlines()
    assert said.startswith("no traces are sent though OTEL_EXPORTER_OTLP_ENDPOINT is set: ")
    assert "pip install lorry[otel]" in said
    assert again == "None"


@pytest.mark.parametrize(
    ("environment", "is_it"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_traces_are_wanted_as_the_standard_says(environment: dict[str, str], is_it: bool) -> None:
    assert tracing.is_wanted(environment) == is_it


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        HEADER.replace("00-", "ff-", 1),
        HEADER + "-x",
        HEADER.upper(),
    ],
)
def test_a_header_that_is_none_begins_a_trace(header: str | None) -> None:
    assert tracing.understood(header) is None
    assert tracing.understood(HEADER) == HEADER
