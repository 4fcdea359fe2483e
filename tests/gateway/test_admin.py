"""Tenants and keys over HTTP; and what keys with fewer scopes are told there, by the official SDK, too."""

import json
from collections.abc import Callable, Iterator

import httpx
import pytest
from fastapi.routing import APIRoute

from lorry.gateway import admin
from lorry.storage.store import Store
from lorry.wire.ids import TenantId
from lorry.wire.limits import SCOPES, Scope
from tests.conftest import Server

from .conftest import Tenant
from .test_requests import a_pass, a_run


@pytest.fixture
def make_key(http_server: Server) -> Callable[..., str]:
    def make(tenant: str, *scopes: Scope) -> str:
        store = Store(http_server.data)
        try:
            return store.create_key(TenantId(tenant), 1.0, "", scopes)
        finally:
            store.close()

    return make


@pytest.fixture
def boss(http_server: Server, make_key: Callable[..., str]) -> Iterator[httpx.Client]:
    headers = {"X-API-Key": make_key("admin", *SCOPES)}
    with httpx.Client(base_url=f"{http_server.url}/admin", headers=headers, timeout=None) as client:
        yield client


def test_a_key_is_made_used_listed_and_revoked(boss: httpx.Client, http_server: Server) -> None:
    made = boss.post("keys", json={"tenant": "carol", "name": "laptop", "scopes": ["read", "train"]})
    assert made.status_code == 201
    key, info = made.json()["api_key"], made.json()["info"]
    assert key.startswith("tml-")
    assert info["scopes"] == ["train", "read"]
    with Tenant(http_server, key).http() as carol:
        assert carol.get("auth/apikey/me").json()["name"] == "carol"
        (listed,) = boss.get("keys", params={"tenant": "carol"}).json()
        assert listed["name"] == "laptop"
        assert listed["used_at"] is not None
        assert key not in boss.get("keys").text
        assert boss.delete(f"keys/{info['key']}").status_code == 204
        assert carol.get("training_runs").status_code == 401
    assert boss.get("keys", params={"tenant": "carol"}).json()[0]["revoked_at"] is not None


def test_a_tenant_is_made_weighed_and_removed(boss: httpx.Client) -> None:
    assert boss.post("tenants", json={"tenant": "dora", "weight": 2}).status_code == 204
    assert boss.patch("tenants/dora", json={"weight": 3}).status_code == 204
    boss.post("keys", json={"tenant": "dora"})
    (dora,) = (tenant for tenant in boss.get("tenants").json() if tenant["tenant"] == "dora")
    assert (dora["weight"], dora["keys"], dora["removed_at"]) == (3, 1, None)
    assert boss.delete("tenants/dora").status_code == 204
    (dora,) = (tenant for tenant in boss.get("tenants").json() if tenant["tenant"] == "dora")
    assert dora["keys"] == 0
    assert dora["removed_at"] is not None


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "keys", {"tenant": "a b"}, 400, "tenant is 'a b', expected 1 to 128 letters"),
        ("POST", "keys", {"tenant": "eve", "scopes": []}, 400, "scopes is [], expected one or more of train"),
        ("POST", "keys", {"tenant": "eve", "scopes": ["all"]}, 422, "scopes"),
        ("POST", "keys", {"tenant": "eve", "expires_at": 1}, 400, "expires_at is 1.0, expected Unix seconds in the f"),
        ("POST", "keys", {"tenant": "eve", "expires": 1}, 422, "expires"),
        ("DELETE", "keys/key-000000000000", None, 404, "there is no key 'key-000000000000'"),
        ("POST", "tenants", {"tenant": "eve", "weight": 0}, 400, "weight is 0.0, expected a number from 0.001"),
        ("PATCH", "tenants/nobody", {"weight": 1}, 404, "there is no tenant 'nobody'"),
        ("DELETE", "tenants/nobody", None, 404, "there is no tenant 'nobody'"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_changes_nothing(
    boss: httpx.Client, method: str, path: str, body: object, status: int, says: str
) -> None:
    before = boss.get("keys").json(), boss.get("tenants").json()
    answer = boss.request(method, path, json=body)
    assert answer.status_code == status
    assert says in json.dumps(answer.json(), ensure_ascii=False)
    assert (boss.get("keys").json(), boss.get("tenants").json()) == before


def test_what_waits_is_told_to_its_tenant_and_to_administrators(
    boss: httpx.Client, new_tenant: Callable[[], Tenant]
) -> None:
    """The second request of a run waits for the first, which does not come."""
    with new_tenant().http() as owner, new_tenant().http() as stranger:
        run = a_run(owner)
        owner.post("forward_backward", content=a_pass(run, 2))
        (job,) = owner.get("jobs").json()["jobs"]
        assert job["future"] == f"{run}:2"
        assert "request 1" in job["reason"]
        assert stranger.get("jobs").json()["total"] == 0
        assert stranger.get("jobs", params={"run": run}).status_code == 404
        asked = {"tenant": job["tenant"], "run": run, "kind": "forward_backward", "limit": 1, "newest": True}
        found = boss.get("jobs", params=asked).json()
        assert (found["total"], found["jobs"]) == (1, [job])
        assert boss.get("jobs", params={"limit": 0}).status_code == 422
        assert boss.get("jobs", params={"kind": "nothing"}).status_code == 422


def routes() -> list[tuple[str, str]]:
    found = [route for route in admin.router.routes if isinstance(route, APIRoute)]
    """As they are described: `{holder:path}` takes slashes, and is `{holder}` all the same."""
    return [(method, route.path.replace(":path}", "}")) for route in found for method in sorted(route.methods)]


def test_nobody_but_an_administrator_gets_in(http_server: Server, make_key: Callable[..., str]) -> None:
    everything_else = make_key("mallory", "train", "sample", "read")
    address = f"{http_server.url}/admin"
    for method, path in routes():
        place = path.format(key="key-000000000000", tenant="mallory", holder="tenant:mallory").lstrip("/")
        body: dict[str, object] = {} if "limits" in path else {"weight": 1}
        body |= {"tenant": "mallory"} if method == "POST" and "tenants" in path else {}
        body = {"tenant": "mallory"} if (method, path) == ("POST", "/keys") else body
        for key, status in ((everything_else, 403), ("tml-wrong", 401), ("", 401)):
            answer = httpx.request(method, f"{address}/{place}", json=body, headers={"X-API-Key": key}, timeout=None)
            assert answer.status_code == status, (method, path, answer.text)


def test_the_description_speaks_of_every_route(http_server: Server) -> None:
    described = httpx.get(f"{http_server.url}/admin/openapi.json", timeout=None).json()
    said = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert said == set(routes())
    assert described["components"]["securitySchemes"]["APIKeyHeader"]["name"] == "X-API-Key"


def test_a_key_that_only_reads_is_enough_for_a_program_that_only_reads(
    http_server: Server, make_key: Callable[..., str]
) -> None:
    greta = Tenant(http_server, make_key("greta", "read"))
    with greta.http() as http:
        opened = http.post("create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0"})
        session = opened.json()["session_id"]
        assert http.post("session_heartbeat", json={"session_id": session}).status_code == 200
        assert http.get("training_runs").json()["training_runs"] == []
        body = {"session_id": session, "model_seq_id": 0, "base_model": "jargon-1m", "lora_config": {"rank": 4}}
        assert http.post("create_model", json=body).status_code == 403


def test_the_sdk_is_told_what_a_key_may_not(http_server: Server, make_key: Callable[..., str]) -> None:
    told = Tenant(http_server, make_key("frank", "sample", "read")).run("records.may_not_train")
    assert "PermissionDeniedError" in told["kind"]
    assert "scope is read, sample, expected train for 'create_run'" in told["says"]
    assert told["sampled"] == 4
