"""The gateway's connections to the broker: what ends them, and what happens then."""

from collections.abc import Callable
from pathlib import Path

import anyio
import httpx
import msgpack
import pytest

import lorry
from lorry.gateway.connections import Connections
from lorry.wire import sockets
from lorry.wire.catalogue_messages import Query
from lorry.wire.client_messages import Answer, Welcome
from lorry.wire.codec import encode
from lorry.wire.errors import ConnectionLostError
from lorry.wire.ids import SessionId
from lorry.wire.sequenced import stamp_of
from lorry.wire.sockets import Channel
from lorry.wire.tasks import background_tasks
from tests.conftest import MODEL, standing_still, start_server

from .conftest import Tenant
from .test_requests import a_pass, a_run, a_sample, a_sampler, impatient


async def test_a_deleted_key_closes_at_once_all_that_it_opened(new_tenant: Callable[[], Tenant]) -> None:
    tenant = new_tenant()
    with tenant.http() as http:
        run, token = a_run(http), http.post("auth/token", json={}).json()["jwt"]
        missing = http.post("forward_backward", content=a_pass(run, 2)).json()["request_id"]
    address, headers = f"{tenant.server.url}/api/v1", {"X-API-Key": tenant.key}
    async with (
        lorry.connect(tenant.server.address, api_key=tenant.key) as service,
        httpx.AsyncClient(base_url=address, headers=headers, timeout=None) as http,
    ):
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        answers: list[int] = []

        async def wait_for_what_never_comes() -> None:
            answers.append((await http.post("retrieve_future", json={"request_id": missing})).status_code)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_for_what_never_comes)
            assert (await http.get("training_runs")).status_code == 200
            assert (await http.delete("auth/apikey/me", headers={"X-API-Key": token})).status_code == 204
        assert answers == [401], "a long poll that comes to its end is answered with 200"
        for credential in (tenant.key, token):
            assert (await http.get("training_runs", headers={"X-API-Key": credential})).status_code == 401
        with pytest.raises(lorry.AuthenticationError):
            await training.get_info_async()


async def welcome_then_talk_nonsense(door: Channel) -> None:
    """A broker that lets everybody in, and answers the first question with what is no message."""
    questions = 0
    while True:
        for connection, *frames in await door.receive():
            header = frames[0 if stamp_of(frames) is None else 1]
            if msgpack.unpackb(header)["type"] == "hello":
                door.send([connection, encode(Welcome(SessionId("x"), 5.0, 2**20))])
            elif msgpack.unpackb(header)["type"] == "query":
                questions += 1
                number = msgpack.unpackb(header)["request"]
                nonsense = b"\xc1" if questions == 1 else encode(Answer(number))
                door.send([connection, nonsense, encode("it works")])


async def test_a_connection_that_ends_unexpectedly_is_opened_anew_at_its_next_use() -> None:
    with sockets.bind("tcp://127.0.0.1:*", 2**20) as door:
        async with background_tasks() as tasks:
            tasks.start_soon(welcome_then_talk_nonsense, door)
            connections = Connections(door.address, None, 300.0, tasks)

            async def ask() -> str:
                async with connections.use("tml-key", "peer") as connection:
                    return await connection.ask(Query(connection.next_request(), "tenant"), str)

            with pytest.raises(ConnectionLostError):
                await ask()
            assert await ask() == "it works"


async def test_what_waits_is_told_the_true_reason(tmp_path: Path) -> None:
    """While the actor stands still, a sample is executed, and a second finds no room."""
    server = start_server(tmp_path, "--http", "127.0.0.1:0", "--sample-rows", "2")
    tenant = Tenant(server, server.new_key("patient"))
    try:
        with tenant.http() as http:
            sampler = a_sampler(http)
        with standing_still(server):
            with tenant.http() as http:
                requests = [
                    http.post("asample", json=a_sample(sampler, seq, count=2)).json()["request_id"] for seq in range(2)
                ]
            async with impatient(tenant) as http:

                async def reason(request: str) -> tuple[str, str]:
                    answer = (await http.post("retrieve_future", json={"request_id": request})).json()
                    return answer["queue_state"], answer["queue_state_reason"]

                assert await reason(requests[0]) == ("active", "it is being executed")
                state, why = await reason(requests[1])
                assert state == "active"
                assert why.startswith("it waits for its turn: 0 requests of yours are before it, ")
    finally:
        server.stop()
