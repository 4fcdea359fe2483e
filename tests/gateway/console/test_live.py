"""What is pushed to open pages: each tenant's own, in order, until the key ends or the reader goes."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import Tenant
from tests.gateway.test_requests import a_pass, a_run

from .visitors import signed_in

Event = tuple[str, Any]


def events(answer: httpx.Response) -> Iterator[Event]:
    """Without what only says that the connection is there."""
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def points(told: Iterator[Event]) -> list[dict[str, Any]]:
    """Of the next event that has some."""
    return next(data for name, data in told if name == "points")


def log(http: httpx.Client, run: str, step: int, **values: float | str) -> None:
    answer = http.post(f"training_runs/{run}/metrics", json={"points": [{"step": step, "values": values}]})
    assert answer.status_code == 204, answer.text


def test_a_page_is_told_of_its_tenants_runs_and_of_no_others(new_tenant: Callable[[], Tenant]) -> None:
    alice, mallory = new_tenant(), new_tenant()
    url = alice.server.url
    with (
        alice.http() as http,
        mallory.http() as theirs,
        signed_in(url, alice.key) as hers,
        signed_in(url, mallory.key) as client,
    ):
        run, other, foreign = a_run(http), a_run(http), a_run(theirs)
        with (
            hers.stream("GET", "live", params={"page": "runs"}) as of_all,
            hers.stream("GET", "live", params={"page": "run", "run": run}) as of_one,
            client.stream("GET", "live", params={"page": "runs", "run": [run, foreign]}) as of_mallory,
        ):
            assert of_all.headers["content-type"].startswith("text/event-stream")
            every, one, seen = events(of_all), events(of_one), events(of_mallory)
            log(http, other, 0, reward=0.25)
            assert points(every) == [{"run": other, "source": "loop", "step": 0, "values": {"loop/reward": 0.25}}]
            log(http, run, 0, reward="NaN")
            assert points(every) == [{"run": run, "source": "loop", "step": 0, "values": {"loop/reward": None}}]
            assert points(one) == [{"run": run, "source": "loop", "step": 0, "values": {"loop/reward": None}}]
            log(theirs, foreign, 7, reward=1.0)
            assert points(seen) == [{"run": foreign, "source": "loop", "step": 7, "values": {"loop/reward": 1.0}}]
            http.post("forward_backward", content=a_pass(run, 1))
            (told,) = points(one)
            assert "training/loss:sum" in told["values"]


def test_a_page_of_what_waits_is_made_anew_when_that_changes(new_tenant: Callable[[], Tenant]) -> None:
    tenant = new_tenant()
    with tenant.http() as http, signed_in(tenant.server.url, tenant.key) as client:
        run = a_run(http)
        with client.stream("GET", "live", params={"page": "waiting"}) as answer:
            told = events(answer)
            http.post("forward_backward", content=a_pass(run, 2))  # waits for the one before it
            while run not in (data := next(data for name, data in told if name == "fragment"))["html"]:
                pass
            assert data["id"] == "jobs"
            http.post("forward_backward", content=a_pass(run, 1))
            while "Nothing waits" not in next(data for name, data in told if name == "fragment")["html"]:
                pass


def test_a_stream_ends_with_its_key(new_tenant: Callable[[], Tenant]) -> None:
    tenant = new_tenant()
    with tenant.http() as http, signed_in(tenant.server.url, tenant.key) as client:
        with client.stream("GET", "live", params={"page": "runs"}) as answer:
            assert http.delete("auth/apikey/me").status_code == 204
            assert [name for name, _ in events(answer) if name == "points"] == []
        assert client.get("live", params={"page": "runs"}, headers={"accept": "text/event-stream"}).status_code == 401


@pytest.mark.parametrize("page", ["deployment", "nothing", ""])
def test_what_cannot_be_followed_is_refused_before_anything_is_sent(
    new_tenant: Callable[[], Tenant], page: str
) -> None:
    tenant = new_tenant()
    with signed_in(tenant.server.url, tenant.key) as client:
        answer = client.get("live", params={"page": page}, headers={"accept": "text/event-stream"})
        assert answer.status_code == (403 if page == "deployment" else 400)
        assert answer.headers["content-type"].startswith("text/plain")
        many = [("page", "runs"), *(("run", str(i)) for i in range(21))]
        assert client.get("live", params=many).status_code == 400
