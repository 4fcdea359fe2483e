"""Limits as scripts of the official SDK meet them."""

from collections.abc import Callable

import httpx
import pytest

from tests.conftest import Server

from .conftest import Tenant
from .test_admin import boss, make_key  # noqa: F401  fixtures

QUICKLY = {"requests_per_s": 40, "rank": 8, "queued_tokens": 60, "concurrent_samples": 2}


@pytest.fixture
def limited(boss: httpx.Client, http_server: Server, make_key: Callable[..., str]) -> Callable[..., Tenant]:  # noqa: F811
    def limited(name: str, **limits: object) -> Tenant:
        key = make_key(name, "train", "sample", "read")
        assert boss.put(f"limits/tenant:{name}", json=limits).status_code == 204
        return Tenant(http_server, key)

    return limited


def test_a_script_within_limits_takes_longer_and_is_done(limited: Callable[..., Tenant]) -> None:
    found = limited("grace", **QUICKLY).run("records.within_limits")
    assert "rank is 16, the limit of tenant:grace is 8. Make an adapter of a smaller rank" in found["refused"]
    assert "concurrent_samples is 3 of one request, the limit of tenant:grace is 2" in found["too_many"]
    assert (found["steps"], found["sequences"]) == (8, 8)


def test_a_script_that_stores_too_much_is_told_so_and_goes_on(limited: Callable[..., Tenant]) -> None:
    found = limited("henry", stored_bytes=0).run("records.beyond_limits")
    assert "stored_bytes is 0, the limit of tenant:henry is 0. Delete checkpoints" in found["saved"]
    assert found["steps"] == 2


def test_a_script_with_a_limit_in_each_way_is_told_which(
    boss: httpx.Client,  # noqa: F811
    limited: Callable[..., Tenant],
) -> None:
    lena = limited("lena", runs=1, monthly_usd=0)
    assert boss.put("limits/project:lena/thrift", json={"rank": 4}).status_code == 204
    found = lena.run("records.without_money")
    assert "rank is 8, the limit of project:lena/thrift is 4" in found["rank"]
    assert "runs is 1, the limit of tenant:lena is 1. A run counts for 60 minutes" in found["runs"]
    for refused in (found["spent"], found["again"]):
        assert "monthly_usd is 0.000000, the limit of tenant:lena is 0.000000. It ends with the month" in refused
    assert boss.put("limits/tenant:lena", json={"models": ["another"]}).status_code == 204
    with lena.http() as http:
        session = http.post("create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0"}).json()
        body = {"session_id": session["session_id"], "model_seq_id": 0, "base_model": "jargon-1m"}
        refused = http.post("create_model", json=body | {"lora_config": {"rank": 4}})
        assert refused.status_code == 403
        assert "models is 'jargon-1m', the limit of tenant:lena is another" in refused.json()["detail"]


def test_who_comes_too_fast_is_told_when_to_come_again(limited: Callable[..., Tenant]) -> None:
    with limited("ida", requests_per_s=0.01).http() as http:
        answers = [
            http.post("create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0"}) for _ in range(2)
        ]
        assert [answer.status_code for answer in answers] == [200, 429]
        assert 0 < int(answers[1].headers["Retry-After"]) <= 100
        assert "requests_per_s is above 0.01, the limit of tenant:ida" in answers[1].json()["detail"]


def test_limits_are_listed_lifted_and_refused_by_name(boss: httpx.Client, limited: Callable[..., Tenant]) -> None:  # noqa: F811
    limited("jack", runs=1)
    (found,) = (each for each in boss.get("limits").json() if each["holder"] == "tenant:jack")
    assert {name: value for name, value in found["limits"].items() if value is not None} == {"runs": 1}
    assert boss.put("limits/tenant:jack", json={}).status_code == 204
    assert boss.put("limits/tenant:nobody", json={}).status_code == 404
    assert boss.put("limits/project:jack/birds", json={"rank": 4}).status_code == 204
    assert boss.put("limits/project:jack/a b", json={"rank": 4}).status_code == 400
    assert boss.put("limits/somebody", json={}).status_code == 400
    assert boss.put("limits/everyone", json={"runs": -1}).status_code == 422
    assert boss.put("limits/everyone", json={"run": 1}).status_code == 422
