"""What is measured: Prometheus can read it, all of it is told on the page, and it names nobody."""

import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import promql_parser
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import lorry
from lorry.gateway.app import running
from lorry.gateway.config import GatewayConfig
from lorry.storage.store import Store
from lorry.wire.ids import TenantId
from lorry.wire.limits import Scope
from tests.conftest import ROOT, Server
from tests.scheduler.test_client_door import DATUM, Serving


def read(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(families: dict[str, Metric], sample: str, **labels: str) -> list[float]:
    found = [each for family in families.values() for each in family.samples if each.name == sample]
    return [each.value for each in found if labels.items() <= each.labels.items()]


@asynccontextmanager
async def measured(service: Serving, *scopes: Scope) -> AsyncGenerator[httpx.AsyncClient]:
    """A gateway in front of a broker, and a client with such a key."""
    key = service.store.create_key(TenantId("watcher"), 1.0, scopes=scopes)
    async with (
        running(GatewayConfig(service.address, port=0)) as url,
        httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=None) as http,
    ):
        yield http


async def test_what_waits_and_what_is_over_is_counted_by_model_and_kind(tmp_path: Path) -> None:
    async with (
        Serving(tmp_path) as service,
        measured(service, "metrics") as http,
        lorry.connect(service.address, api_key=service.key) as alice,
    ):
        training = await alice.create_lora_training_client_async("m", rank=4)
        futures = [await training.forward_backward_async([DATUM], "cross_entropy") for _ in range(3)]
        waiting = read((await http.get("/metrics")).text)
        of = {"model": "m", "kind": "forward_backward"}
        assert values(waiting, "lorry_open_commands", **of) == [3]
        assert values(waiting, "lorry_oldest_command_seconds", **of)[0] > 0
        assert values(waiting, "lorry_commands_finished_total") == []
        service.may_work.set()
        for future in futures:
            await future
        after = read((await http.get("/metrics")).text)
        assert values(after, "lorry_open_commands", **of) == []
        assert values(after, "lorry_commands_finished_total", state="done", **of) == [3]
        for stage in ("queue_", "execution_", ""):
            assert values(after, f"lorry_command_{stage}seconds_count", kind="forward_backward") == [3]
        assert values(after, "lorry_micro_batch_commands_sum", mode="train") == [3]
        assert values(after, "lorry_actors", model="m", state="ready") == [1]
        assert values(after, "lorry_unsaved_runs") == [1]
        await training.save_state("kept")
        saved = read((await http.get("/metrics")).text)
        assert values(saved, "lorry_unsaved_runs") == [0]
        assert values(saved, "lorry_oldest_unsaved_seconds") == [0]
        assert values(saved, "lorry_journal_commit_operations_count")[0] > 0
        told = (await http.get("/metrics")).text
        for name in ("alice", "watcher", training.model_id, service.key):
            assert name not in told


async def test_it_is_for_who_administers_or_measures_and_who_measures_may_read_nothing_else(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        for scopes in (("metrics",), ("admin",)):
            async with measured(service, *scopes) as http:  # type: ignore[arg-type]
                assert (await http.get("/metrics")).status_code == 200
        async with measured(service, "train", "sample", "read") as http:
            refused = await http.get("/metrics")
            assert (refused.status_code, refused.json()["field"]) == (403, "scope")
        async with measured(service, "metrics") as http:
            assert (await http.get("/metrics", headers={"Authorization": "Bearer tml-wrong"})).status_code == 401
            assert (await http.get("/metrics", headers={"Authorization": ""})).status_code == 401
            routes = ("jobs", "training_runs", "sessions", "checkpoints", "audit", "get_server_capabilities")
            told = [(await http.get(f"/api/v1/{route}")).status_code for route in routes]
            assert told == [403] * len(routes)
            posts = ("auth/token", "create_session")
            bodies = ({}, {"tags": [], "user_metadata": None, "sdk_version": "x"})
            told = [
                (await http.post(f"/api/v1/{route}", json=b)).status_code
                for route, b in zip(posts, bodies, strict=True)
            ]
            assert told == [403, 403]
            assert (await http.get("/admin/keys")).status_code == 403


async def test_requests_are_counted_by_template_and_no_path_of_a_clients_becomes_a_label(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, measured(service, "admin", "read") as http:
        await http.get("/api/v1/sessions/session-secret")
        await http.get("/api/v1/training_runs/run-secret/checkpoints/weights/secret/archive")
        await http.get("/nowhere/secret")
        await http.request("PROPFIND", "/api/v1/jobs")
        await http.post("/api/v1/healthz")
        await http.post("/api/v1/optim_step", json={"model_id": "secret"})
        await http.get("/admin/keys?tenant=secret")
        await http.get("/admin/secret")
        await http.get("/v1/models/secret")
        await http.get("/v1/secret/of/mine")
        await http.post("/services/tinker-prod/anthropic/api/v1/messages/count_tokens", content=b"secret")
        text = (await http.get("/metrics")).text
        assert "secret" not in text.lower()
        families = read(text)
        counted = {
            (sample.labels["method"], sample.labels["route"], sample.labels["status"])
            for sample in families["lorry_http_requests"].samples
            if sample.name.endswith("_total")
        }
        assert counted == {
            ("GET", "/api/v1/sessions/{session_id}", "404"),
            ("GET", "/api/v1/training_runs/{run_id}/checkpoints/{checkpoint_id:path}/archive", "404"),
            ("GET", "unknown", "404"),
            ("other", "/api/v1/jobs", "405"),
            ("POST", "/api/v1/healthz", "405"),
            ("POST", "/api/v1/optim_step", "422"),
            ("GET", "/admin/keys", "200"),
            ("GET", "/v1/models/{model:path}", "404"),
            ("POST", "/services/tinker-prod/anthropic/api/v1/messages/count_tokens", "400"),
        }
        assert values(families, "lorry_http_requests_in_flight") == [1]
        assert values(families, "lorry_http_keys") == [1]


# The page and the dashboard ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(http_server: Server) -> str:
    """What a service of all its processes exports."""
    store = Store(http_server.data)
    try:
        key = store.create_key(TenantId("watcher"), 1.0, scopes=["metrics"])
    finally:
        store.close()
    return httpx.get(f"{http_server.url}/metrics", headers={"Authorization": f"Bearer {key}"}, timeout=None).text


def named(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


def test_each_metric_is_on_the_page_with_its_labels_and_the_page_has_no_other(exported: str) -> None:
    page = (ROOT / "docs/observing.md").read_text()
    rows = re.findall(r"^\| `(lorry_\w+)` \| ([\w, ]*)\|", page, re.MULTILINE)
    on_page = {name: {label.strip() for label in labels.split(",")} - {""} for name, labels in rows}
    families = read(exported)
    assert on_page.keys() == {named(family) for family in families.values()}
    for family in families.values():
        assert re.fullmatch(r"lorry(_[a-z]+)+", family.name), family.name
        assert family.documentation.endswith("."), family.name
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == on_page[named(family)], sample


def samples_of(family: Metric) -> set[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
    return {family.name + suffix for suffix in suffixes}


def selected(expression: promql_parser.Expr) -> Iterator[str]:
    """The names of metrics that a PromQL expression asks for."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression.name
    elif isinstance(expression, promql_parser.MatrixSelector):
        yield expression.vector_selector.name
    else:
        parts = [getattr(expression, part, None) for part in ("expr", "lhs", "rhs")]
        for inner in (*parts, *getattr(expression, "args", ())):
            if isinstance(inner, promql_parser.Expr):
                yield from selected(inner)


def test_the_dashboard_asks_for_what_there_is_and_shows_all_of_it(exported: str) -> None:
    panels = json.loads((ROOT / "docs/grafana/lorry.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    asked = [
        name for each in expressions for name in selected(promql_parser.parse(each.replace("$__rate_interval", "5m")))
    ]
    families = read(exported)
    assert set(asked) <= {name for family in families.values() for name in samples_of(family)}
    unseen = [family.name for family in families.values() if samples_of(family).isdisjoint(asked)]
    assert unseen == []
    assert len(asked) >= len(expressions)
