"""Who says hello: how many of a tenant may be in at a time, and what becomes of those who are told to wait."""

from pathlib import Path

import anyio
import pytest

import lorry
from lorry.client.connection import open_connection
from lorry.scheduler import reception
from lorry.wire import sockets
from lorry.wire.catalogue_messages import Query
from lorry.wire.client_messages import VERSION, Failed, Hello
from lorry.wire.codec import decode, encode
from lorry.wire.errors import TooManyTriesError, TooManyWaitingError
from lorry.wire.ids import TenantId

from .test_client_door import Serving


async def test_a_tenant_has_so_many_connections_and_another_its_own(tmp_path: Path) -> None:
    async with Serving(tmp_path, sessions_per_tenant=2) as service:
        bob = service.store.create_key(TenantId("bob"), 1.0)
        second = service.store.create_key(TenantId("alice"), 1.0)
        async with open_connection(service.address, service.key), open_connection(service.address, second):
            with pytest.raises(TooManyWaitingError) as refused:
                async with open_connection(service.address, service.key, timeout_s=2.0):
                    pass
            assert "tenant 'alice' has 2 connections open, which is the limit" in str(refused.value)
            assert refused.value.field == "sessions_per_tenant"
            async with open_connection(service.address, bob):
                pass


async def test_who_finds_too_many_comes_in_when_one_has_left(tmp_path: Path) -> None:
    async with Serving(tmp_path, sessions_per_tenant=1) as service:
        is_in = anyio.Event()

        async def come_later() -> None:
            async with lorry.connect(service.address, api_key=service.key) as client:
                assert (await client.get_server_capabilities_async()).supported_models
                is_in.set()

        async with anyio.create_task_group() as tasks:
            async with open_connection(service.address, service.key) as first:
                tasks.start_soon(come_later)
                await first.ask(Query(first.next_request(), "tenant"), str)
                assert not is_in.is_set()
            await is_in.wait()


async def test_a_gateway_is_told_at_once_to_come_again(tmp_path: Path) -> None:
    async with Serving(tmp_path, sessions_per_tenant=1) as service, open_connection(service.address, service.key):
        with pytest.raises(TooManyWaitingError) as refused:
            async with open_connection(service.address, service.key, timeout_s=3600, relays=True):
                pass
        assert refused.value.after_s is not None


async def test_a_connection_that_showed_many_wrong_keys_waits_and_another_does_not(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        with sockets.connect(service.address, None, b"mallory") as door:
            for number in range(40):
                door.send([encode(Hello(VERSION, f"tml-wrong-{number}", "mallory"))])
                ((answer,),) = await door.receive()
        refused = decode(answer, Failed).error
        assert refused.code == TooManyTriesError.__name__ and refused.after_s is not None
        async with open_connection(service.address, service.key):
            pass


async def test_so_many_unknown_keys_wait_to_be_looked_up_and_one_that_was_right_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "_UNKNOWN_AT_MOST", 0)
    async with Serving(tmp_path) as service:
        with pytest.raises(TooManyWaitingError):
            async with open_connection(service.address, service.key, timeout_s=2.0):
                pass
        monkeypatch.setattr(reception, "_UNKNOWN_AT_MOST", 1)
        async with open_connection(service.address, service.key):
            pass
        monkeypatch.setattr(reception, "_UNKNOWN_AT_MOST", 0)
        async with open_connection(service.address, service.key, relays=True):
            pass
