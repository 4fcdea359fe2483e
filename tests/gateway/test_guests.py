"""Wrong keys over HTTP: who shows many is told to wait, and who shows a right one is not. And a key that is right has
so many requests under way, and no more."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import httpx
import pytest

from lorry.gateway import connections
from lorry.gateway.app import running
from lorry.gateway.config import GatewayConfig, HttpSettings
from lorry.gateway.errors import OverloadedError
from lorry.gateway.guests import Guests
from lorry.scheduler.access.keyring import Keyring
from lorry.storage.rows import KeyRow
from lorry.wire.attempts import Attempts
from lorry.wire.errors import AuthenticationError, TooManyTriesError
from lorry.wire.ids import TenantId
from tests.scheduler.test_client_door import Serving

from .conftest import Tenant
from .refusals import ADAM

BURST = 20


@asynccontextmanager
async def door(data: Path, **settings: object) -> AsyncIterator[tuple[Serving, httpx.AsyncClient]]:
    http = HttpSettings(**settings)  # type: ignore[arg-type]
    async with (
        Serving(data) as service,
        running(GatewayConfig(service.address, port=0, long_poll_s=3600, http=http)) as url,
        httpx.AsyncClient(base_url=f"{url}/api/v1", timeout=None) as client,
    ):
        yield service, client


async def shown(http: httpx.AsyncClient, key: str, **headers: str) -> httpx.Response:
    return await http.get("get_server_capabilities", headers={"X-API-Key": key} | headers)


async def test_many_wrong_keys_are_told_to_wait_and_a_right_one_from_there_works_all_the_while(tmp_path: Path) -> None:
    async with door(tmp_path) as (service, http):
        assert (await shown(http, service.key)).status_code == 200
        answers = [await shown(http, f"tml-wrong-{number}") for number in range(BURST * 2)]
        assert [answer.status_code for answer in answers[:BURST]] == [401] * BURST
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) >= BURST // 2, "beside those that time has brought"
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert "too many wrong keys came from 127.0.0.1" in refused[0].json()["detail"]
        assert (await shown(http, service.key)).status_code == 200


async def test_the_same_wrong_key_again_and_again_is_asked_of_the_broker_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    find = Keyring.find

    async def counted(self: Keyring, api_key: str, tenant: TenantId | None = None) -> KeyRow | None:
        asked.append(api_key)
        return await find(self, api_key, tenant)

    monkeypatch.setattr(Keyring, "find", counted)
    async with door(tmp_path) as (_, http):
        found = Counter[int]()
        for _ in range(BURST * 2):
            found[(await shown(http, "tml-wrong")).status_code] += 1
        assert found[401] >= BURST and found[429] > 0
        assert set(found) == {401, 429}
    assert asked == ["tml-wrong"]


async def test_a_key_that_was_just_made_works_at_once_beside_wrong_ones(tmp_path: Path) -> None:
    async with door(tmp_path) as (service, http):
        for number in range(BURST // 2):
            assert (await shown(http, f"tml-wrong-{number}")).status_code == 401
            new = service.store.create_key(TenantId(f"new-{number}"), 1.0)
            assert (await shown(http, new)).status_code == 200


async def test_a_client_behind_a_proxy_that_is_named_is_limited_for_itself(tmp_path: Path) -> None:
    async with door(tmp_path, trusted_proxies="127.0.0.0/8") as (_, http):
        for number in range(BURST * 2):
            last = await shown(http, f"tml-wrong-{number}", **{"X-Forwarded-For": "198.51.100.7"})
        assert last.status_code == 429
        assert (await shown(http, "tml-x", **{"X-Forwarded-For": "198.51.100.8"})).status_code == 401


async def test_who_is_no_proxy_stays_who_he_is_whatever_he_says(tmp_path: Path) -> None:
    async with door(tmp_path, trusted_proxies="10.0.0.0/8") as (_, http):
        for number in range(BURST * 2):
            last = await shown(http, f"tml-wrong-{number}", **{"X-Forwarded-For": f"198.51.100.{number}"})
        assert last.status_code == 429


async def test_a_key_has_so_many_requests_under_way_and_others_have_their_own(tmp_path: Path) -> None:
    async with door(tmp_path, requests_per_key=2) as (service, http):
        missing = await what_never_comes(http, service.key)
        other = service.store.create_key(TenantId("bob"), 1.0)
        async with anyio.create_task_group() as tasks:
            statuses: list[int] = []

            async def wait_for_what_never_comes() -> None:
                body, answer = {"request_id": missing}, None
                while answer is None or answer.status_code == 429:  # it came while the loop below asked
                    answer = await http.post("retrieve_future", json=body, headers={"X-API-Key": service.key})
                statuses.append(answer.status_code)

            for _ in range(2):
                tasks.start_soon(wait_for_what_never_comes)
            while (found := await shown(http, service.key)).status_code == 200:
                pass  # until both have arrived
            assert found.status_code == 429
            assert found.headers["retry-after"] == "1"
            assert "2 requests with this key are being answered" in found.json()["detail"]
            assert (await shown(http, other)).status_code == 200
            assert statuses == []
            tasks.cancel_scope.cancel()


async def test_a_key_whose_requests_all_wait_may_still_send_what_they_wait_for(tmp_path: Path) -> None:
    async with door(tmp_path, requests_per_key=4) as (service, http):
        missing, headers = await what_never_comes(http, service.key), {"X-API-Key": service.key}
        told = anyio.Event()
        async with anyio.create_task_group() as tasks:

            async def wait_for_what_never_comes() -> None:
                answer = await http.post("retrieve_future", json={"request_id": missing}, headers=headers)
                assert answer.status_code == 429, "one too many"
                told.set()

            for _ in range(4):
                tasks.start_soon(wait_for_what_never_comes)
            await told.wait()
            assert (await shown(http, service.key)).status_code == 200
            tasks.cancel_scope.cancel()


async def test_the_sdk_survives_that_a_key_has_few_requests_under_way(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def counted(problem: str) -> OverloadedError:
        refused.append(problem)
        return OverloadedError(problem)

    monkeypatch.setattr(connections, "OverloadedError", counted)
    config = GatewayConfig(tenant.server.address, port=0, http=HttpSettings(requests_per_key=16))
    async with running(config) as url:
        narrow = replace(tenant, server=replace(tenant.server, url=url))
        told = await anyio.to_thread.run_sync(narrow.run, "sampling.crowd")
    assert len(told["lengths"]) == 64
    assert refused, "or it shows nothing"


async def what_never_comes(http: httpx.AsyncClient, key: str) -> str:
    """A request that waits for the one before it."""
    headers = {"X-API-Key": key}
    opened = await http.post(
        "create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0"}, headers=headers
    )
    body = {
        "session_id": opened.json()["session_id"],
        "model_seq_id": 0,
        "base_model": "m",
        "lora_config": {"rank": 4},
    }
    run = (await http.post("create_model", json=body, headers=headers)).json()["request_id"].partition("@")[2]
    step = {"model_id": run, "seq_id": 2, "optim_params": ADAM}
    return (await http.post("optim_step", json=step, headers=headers)).json()["request_id"]


# What is remembered --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


WRONG = AuthenticationError("api_key is wrong", field="api_key")


async def test_a_key_that_was_right_is_never_kept_waiting_until_it_is_wrong() -> None:
    clock = Clock()
    guests = Guests(clock, Attempts(burst=1))
    await guests.try_("right", "here")
    guests.was_right("right", "here")
    await guests.try_("wrong", "here")
    guests.was_wrong("wrong", WRONG)
    with pytest.raises(TooManyTriesError) as refused:
        await guests.try_("wrong", "here")
    assert refused.value.after_s == 1.0
    for _ in range(10):
        await guests.try_("right", "here")
    guests.was_wrong("right", WRONG)
    with pytest.raises(TooManyTriesError):
        await guests.try_("right", "here")


async def test_a_wrong_key_is_remembered_for_a_moment_and_a_broker_that_does_not_answer_costs_no_try() -> None:
    clock = Clock()
    guests = Guests(clock, Attempts(burst=2))
    for _ in range(5):
        await guests.try_("unheard", "here")
        guests.was_not_tried("unheard", "here")
    await guests.try_("wrong", "here")
    guests.was_wrong("wrong", WRONG)
    with pytest.raises(AuthenticationError):
        await guests.try_("wrong", "here")
    clock.now = 30.0
    await guests.try_("wrong", "here")
