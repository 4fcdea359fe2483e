"""Requests that the SDK would not make, or not so: each is answered, cheaply, and none with a 500."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psutil
import pytest
import zstandard
from tinker.proto import tinker_public_pb2 as public_pb

from lorry.gateway.app import running
from lorry.gateway.config import GatewayConfig
from tests.conftest import MODEL, children_of

from .conftest import Tenant

MIB = 2**20


def a_pass(run: str = "nobody", seq: int = 1, **tensor: Any) -> bytes:
    message = public_pb.ForwardBackwardRequest(model_id=run, seq_id=seq, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = b"\1\0\0\0\2\0\0\0"
    fields: dict[str, Any] = {"dtype": public_pb.DTYPE_INT32, "dense": b"\2\0\0\0\3\0\0\0", "shape": [2]}
    datum.loss_fn_inputs["target_tokens"].CopyFrom(public_pb.Tensor(**(fields | tensor)))
    return message.SerializeToString()


def a_run(http: httpx.Client) -> str:
    session = http.post("create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0"}).json()
    body = {"session_id": session["session_id"], "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 4}}
    return http.post("create_model", json=body).json()["model_id"]


def a_sampler(http: httpx.Client) -> str:
    session = a_run(http).partition(":")[0]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    return http.post("create_sampling_session", json=body).json()["sampling_session_id"]


def a_sample(sampler: str, seq: int, tokens: int = 2, count: int = 1) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "num_samples": count,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
        "sampling_params": {"max_tokens": tokens, "stop": []},
    }


BOMB = zstandard.ZstdCompressor().compress(bytes(1024 * MIB))
BODIES: dict[str, tuple[bytes, str, int]] = {
    "a bomb": (BOMB, "zstd", 413),
    "too much": (bytes(65 * MIB), "identity", 413),
    "half of a frame": (zstandard.ZstdCompressor().compress(a_pass() * 100)[:-20], "zstd", 422),
    "no zstd": (b"no zstd", "zstd", 422),
    "an unknown encoding": (b"", "br", 422),
    "no protobuf": (b"\xff\xff\xff", "identity", 422),
    "nothing": (b"", "identity", 400),
    "a tensor that does not fill its shape": (a_pass(shape=[3]), "identity", 422),
    "a tensor without a type": (a_pass(dtype=0), "identity", 422),
    "somebody else's run": (a_pass(), "identity", 404),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_pass_is_refused(tenant: Tenant, name: str) -> None:
    body, encoding, status = BODIES[name]
    with tenant.http() as http:
        answer = http.post("forward_backward", content=body, headers={"Content-Encoding": encoding})
    assert answer.status_code == status
    assert answer.json()["detail"]


def test_a_sparse_tensor_that_unfolds_to_a_huge_one_is_refused(tenant: Tenant) -> None:
    csr = public_pb.SparseCsr(values=b"", crow_indices=bytes(8), col_indices=b"")
    tensor = public_pb.Tensor(dtype=public_pb.DTYPE_INT64, sparse_csr=csr, shape=[2**31, 2**31])
    message = public_pb.ForwardBackwardRequest.FromString(a_pass())
    message.data[0].loss_fn_inputs["target_tokens"].CopyFrom(tensor)
    with tenant.http() as http:
        assert http.post("forward_backward", content=message.SerializeToString()).status_code == 400


def test_bombs_cost_bounded_memory(tenant: Tenant) -> None:
    gateway = psutil.Process(children_of(tenant.server.process.pid)["gateway"])
    before = gateway.memory_info().rss
    with tenant.http() as http:
        for _ in range(8):
            http.post("forward_backward", content=BOMB, headers={"Content-Encoding": "zstd"})
    assert gateway.memory_info().rss - before < 256 * MIB


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "create_custom_loss", 422),
        ("PUT", "sessions/x/project", 422),
        ("GET", "sessions/x/trace_export", 404),
        ("GET", "samplers/x", 404),
        ("POST", "create_session", 422),
        ("POST", "nothing_of_the_kind", 404),
        ("GET", "billing/usage/events", 422),
    ],
)
def test_what_is_not_there_says_so(tenant: Tenant, method: str, path: str, status: int) -> None:
    with tenant.http() as http:
        assert http.request(method, path, content=b"").status_code == status


def test_every_endpoint_but_the_public_ones_wants_a_key(tenant: Tenant) -> None:
    with httpx.Client(base_url=f"{tenant.server.url}/api/v1", timeout=None) as http:
        assert http.get("healthz").json() == {"status": "ok"}
        assert http.get("readyz").json()["models"] == {"ready": 1, "loading": 0, "failed": 0}
        assert http.get("training_runs").status_code == 401
        assert http.post("retrieve_future", json={"request_id": "pass@x:1"}).status_code == 401


def test_a_token_works_and_a_forged_one_does_not(tenant: Tenant) -> None:
    with tenant.http() as http:
        token = http.post("auth/token", json={}).json()["jwt"]
        assert http.get("training_runs", headers={"X-API-Key": token}).status_code == 200
        body, _, signature = token.rpartition(".")
        forged = f"{body}.{signature[::-1]}"
        assert http.get("training_runs", headers={"X-API-Key": forged}).status_code == 401


def test_a_request_that_is_sent_twice_is_one_request(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = a_run(http)
        answers = [http.post("forward_backward", content=a_pass(run, 1)).json() for _ in range(2)]
        assert answers[0] == answers[1]
        results = [http.post("retrieve_future", json={"request_id": a["request_id"]}).json() for a in answers]
        assert results[0] == results[1]
        assert "loss:sum" in results[0]["metrics"]


def test_a_resend_in_another_form_is_the_same_request_and_another_content_a_conflict(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = a_run(http)
        weighted = public_pb.ForwardBackwardRequest.FromString(a_pass(run, 1))
        weights = public_pb.Tensor(dtype=public_pb.DTYPE_FLOAT32, shape=[2], dense=b"\0\0\x80?" * 2)
        weighted.data[0].loss_fn_inputs["weights"].CopyFrom(weights)
        sent = weighted.SerializeToString()
        assert http.post("forward_backward", content=sent).status_code == 200
        again = public_pb.ForwardBackwardRequest.FromString(a_pass(run, 1))  # the same in another order, and packed
        again.data[0].loss_fn_inputs.clear()
        again.data[0].loss_fn_inputs["weights"].CopyFrom(weights)
        again.data[0].loss_fn_inputs["target_tokens"].CopyFrom(weighted.data[0].loss_fn_inputs["target_tokens"])
        packed = zstandard.ZstdCompressor().compress(again.SerializeToString())
        assert http.post("forward_backward", content=packed, headers={"Content-Encoding": "zstd"}).status_code == 200
        other = http.post("forward_backward", content=a_pass(run, 1))
        assert other.status_code == 400 and "with another content" in other.json()["detail"]
        body = {"model_id": run, "seq_id": 1, "path": "x"}
        kind = http.post("save_weights", json=body)
        assert kind.status_code == 400 and "forward_backward" in kind.text and "save_state" in kind.text


def test_a_samplers_request_is_not_taken_for_another_under_its_number(tenant: Tenant) -> None:
    with tenant.http() as http:
        sampler = a_sampler(http)
        assert http.post("asample", json=a_sample(sampler, 0, tokens=2)).status_code == 200
        assert http.post("asample", json=a_sample(sampler, 0, tokens=2)).status_code == 200
        assert http.post("asample", json=a_sample(sampler, 0, tokens=3)).status_code == 400


def test_numbers_that_no_database_holds_are_refused_and_end_nothing(tenant: Tenant) -> None:
    with tenant.http() as http:
        sampler = a_sampler(http)
        assert http.post("asample", json=a_sample(sampler, 0, tokens=2**63 - 1)).status_code == 400
        target = {"type": "sampling_session", "sampling_session_id": sampler}
        body = {"target": target, "prev_cursor": 2**63, "timeout": 0}
        assert http.post("retrieve_futures", json=body).status_code in (400, 422)
        assert http.post("asample", json=a_sample(sampler, 1)).status_code == 200


def test_a_cancelled_sample_fails_with_the_users_category(tenant: Tenant) -> None:
    with tenant.http() as http:
        sampler = a_sampler(http)
        request = http.post("asample", json=a_sample(sampler, 0, tokens=4000, count=4)).json()["request_id"]
        assert http.post("cancel_future", json={"request_id": request}).status_code == 204
        failed = http.post("retrieve_future", json={"request_id": request}).json()
        assert failed["category"] == "user"
        target = {"type": "sampling_session", "sampling_session_id": sampler}
        found = http.post("retrieve_futures", json={"target": target}).json()
        assert found["completions"] == [{"state": "failed", "request_id": request}]
        again = {"target": target, "prev_cursor": found["cursor"], "timeout": 0}
        assert http.post("retrieve_futures", json=again).json()["completions"] == []


def test_a_sample_that_takes_longer_than_its_client_said_is_ended_where_it_is_computed(tenant: Tenant) -> None:
    with tenant.http() as http:
        sampler, timeout = a_sampler(http), {"X-Lorry-Timeout-S": "0.3"}
        body = a_sample(sampler, 0, tokens=4000, count=4)
        request = http.post("asample", json=body, headers=timeout).json()["request_id"]
        failed = http.post("retrieve_future", json={"request_id": request}).json()
        assert failed["category"] == "user"
        assert f"{sampler}:0 was not over 0.3 s after it was accepted: it " in failed["error"]
        request = http.post("asample", json=a_sample(sampler, 1)).json()["request_id"]
        assert http.post("retrieve_future", json={"request_id": request}).status_code == 200


def test_a_timeout_that_is_no_number_is_refused_under_its_seq_and_the_run_goes_on(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = a_run(http)
        for seq, wrong in enumerate(("soon", "-1"), 1):
            answer = http.post("forward_backward", content=a_pass(run, seq), headers={"X-Lorry-Timeout-S": wrong})
            failed = http.post("retrieve_future", json={"request_id": answer.json()["request_id"]}).json()
            assert wrong in failed["error"]
            assert failed["category"] == "user"
        request = http.post("forward_backward", content=a_pass(run, 3)).json()["request_id"]
        assert "loss:sum" in http.post("retrieve_future", json={"request_id": request}).json()["metrics"]


def test_who_waits_is_told_what_is_before_it_and_priorities_change_it(tenant: Tenant) -> None:
    with tenant.http() as http:
        sampler = a_sampler(http)
        assert http.put(f"samplers/{sampler}/priority", json={"priority": 3}).status_code == 204
        assert http.put(f"samplers/{sampler}/priority", json={"priority": 300}).status_code == 400
        assert http.put(f"samplers/{sampler}/priority", json={"priority": 10**20}).status_code == 422
        run = a_run(http)
        assert http.put(f"training_runs/{run}/priority", json={"priority": -3}).status_code == 204
        assert http.put("training_runs/nobody/priority", json={"priority": -3}).status_code == 404


def test_an_unloaded_model_can_go_on(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = a_run(http)
        request = http.post("unload_model", json={"model_id": run}).json()["request_id"]
        assert http.post("retrieve_future", json={"request_id": request}).json()["model_id"] == run
        request = http.post("forward_backward", content=a_pass(run, 1)).json()["request_id"]
        assert "loss:sum" in http.post("retrieve_future", json={"request_id": request}).json()["metrics"]
        assert http.post("unload_model", json={"model_id": "nobody"}).status_code == 404


def test_a_finished_session_tells_its_heartbeats_to_stop(tenant: Tenant) -> None:
    with tenant.http() as http:
        session = {"session_id": a_run(http).partition(":")[0]}
        assert http.post("session_heartbeat", json=session).status_code == 200
        body = {"reason": {"type": "success"}}
        assert http.post(f"sessions/{session['session_id']}/finish", json=body).status_code == 204
        assert http.post("session_heartbeat", json=session).status_code == 410


def test_a_samplers_client_sees_all_that_finished_since_it_asked_last_and_nothing_of_others(tenant: Tenant) -> None:
    with tenant.http() as http:
        sampler = a_sampler(http)
        requests = [http.post("asample", json=a_sample(sampler, seq)).json()["request_id"] for seq in range(3)]
        other = http.post("asample", json=a_sample(sampler, 1_000_000_000)).json()["request_id"]
        for request in (*requests, other):
            http.post("retrieve_future", json={"request_id": request})
        target = {"type": "sampling_session", "sampling_session_id": sampler}
        found = http.post("retrieve_futures", json={"target": target}).json()
        assert {done["request_id"]: done["state"] for done in found["completions"]} == dict.fromkeys(
            requests, "finished"
        )
        assert all(done["response_payload_uncompressed_size"] > 0 for done in found["completions"])
        clone = {"target": target | {"cloned_sampler_id": 1}}
        found = http.post("retrieve_futures", json=clone).json()["completions"]
        assert [done["request_id"] for done in found] == [other]


def test_what_a_script_reports_of_itself_is_counted_for_its_tenant(tenant: Tenant) -> None:
    def event(number: int, severity: str) -> dict[str, Any]:
        common = {"event_id": str(number), "event_session_index": number, "timestamp": "2026-01-01T00:00:00Z"}
        return common | {"event": "GENERIC_EVENT", "event_name": "test", "severity": severity, "event_data": {}}

    events = [event(number, severity) for number, severity in enumerate(("INFO", "ERROR", "WARNING"))]
    batch = {"events": events, "platform": "x", "sdk_version": "0", "session_id": "x", "process_uuid": "x"}
    with tenant.http() as http:
        name = http.get("auth/apikey/me").json()["name"]
        assert http.post("telemetry", json=batch).json() == {"status": "accepted"}
    printed = tenant.lorry("status")
    (line,) = [line for line in printed.splitlines() if f" {name} " in line]
    assert [word for word in line.split() if word != "│"] == [name, "1", "0", "3", "1"]


@asynccontextmanager
async def impatient(tenant: Tenant) -> AsyncGenerator[httpx.AsyncClient]:
    """A second gateway of the same broker, that waits for little and holds little."""
    config = GatewayConfig(
        tenant.server.address, port=0, long_poll_s=0.2, max_body_bytes=64 * 1024, max_bytes_in_flight=32 * 1024
    )
    async with (
        running(config) as url,
        httpx.AsyncClient(base_url=f"{url}/api/v1", headers={"X-API-Key": tenant.key}, timeout=None) as http,
    ):
        yield http


async def test_what_waits_for_a_missing_request_says_so(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = a_run(http)
        request = http.post("forward_backward", content=a_pass(run, 2)).json()["request_id"]
    async with impatient(tenant) as http:
        answer = (await http.post("retrieve_future", json={"request_id": request})).json()
    assert answer["type"] == "try_again"
    assert answer["queue_state"] == "active"
    assert answer["queue_state_reason"].endswith("goes on with request 1, which has not arrived")


async def test_more_than_a_gateway_can_hold_is_asked_to_come_again(tenant: Tenant) -> None:
    async with impatient(tenant) as http:
        answer = await http.post("forward_backward", content=bytes(40 * 1024))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"


async def test_a_gateway_without_the_brokers_folder_says_that_it_has_no_files(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = a_run(http)
        body = {"model_id": run, "path": "x", "seq_id": 1}
        request = http.post("save_weights", json=body).json()["request_id"]
        assert http.post("retrieve_future", json={"request_id": request}).json()["path"] == f"tinker://{run}/weights/x"
    async with impatient(tenant) as http:
        answer = await http.get(f"training_runs/{run}/checkpoints/weights/x/archive")
    assert answer.status_code == 400
    assert "--data" in answer.json()["detail"]
