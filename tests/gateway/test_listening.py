"""How many connections HTTP has, and how slow a request may come: who is served already notices nothing of either."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx

from lorry.gateway.app import running
from lorry.gateway.config import GatewayConfig, HttpSettings

from .test_guests import door, shown, what_never_comes

NOBODY = "tcp://127.0.0.1:9"
HEAD = b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\n"


@asynccontextmanager
async def bare(**settings: object) -> AsyncIterator[tuple[str, int]]:
    """A gateway without a broker: it answers who asks whether it lives."""
    http = HttpSettings(**settings)  # type: ignore[arg-type]
    async with running(GatewayConfig(NOBODY, port=0, http=http)) as url:
        yield url, int(url.rpartition(":")[2])


async def test_one_connection_too_many_is_told_so_and_the_others_go_on() -> None:
    async with bare(http_connections=2) as (url, _):
        async with httpx.AsyncClient(base_url=url) as first, httpx.AsyncClient(base_url=url) as second:
            for served in (first, second):
                assert (await served.get("/api/v1/healthz")).status_code == 200
            async with httpx.AsyncClient(base_url=url) as third:
                refused = await third.get("/api/v1/healthz")
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert refused.headers["connection"] == "close"
            for served in (first, second):
                assert (await served.get("/api/v1/healthz")).status_code == 200
        async with httpx.AsyncClient(base_url=url) as later:
            while (await later.get("/api/v1/healthz")).status_code != 200:
                pass  # until the others have left


async def test_an_address_has_so_many_connections_and_a_proxy_that_is_named_has_any() -> None:
    for proxies, status in ((None, 503), ("127.0.0.0/8", 200)):
        async with (
            bare(connections_per_address=1, trusted_proxies=proxies) as (url, _),
            httpx.AsyncClient(base_url=url) as first,
            httpx.AsyncClient(base_url=url) as second,
        ):
            assert (await first.get("/api/v1/healthz")).status_code == 200
            assert (await second.get("/api/v1/healthz")).status_code == status


async def until_it_ends(port: int, *pieces: bytes) -> bytes:
    """What comes back of a connection over which this is sent, and then nothing."""
    found = bytearray()
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        try:
            for piece in pieces:
                await stream.send(piece)
            async for received in stream:
                found += received
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
    return bytes(found)


SLOW = {
    "nothing": (),
    "half a head": (HEAD,),
    "half a body": (HEAD + b"Content-Length: 100000\r\n\r\n", b"x" * 100),
}


async def test_who_sends_nothing_more_is_cut_off_and_who_waits_for_an_answer_is_not(tmp_path: Path) -> None:
    async with door(tmp_path, slow_after_s=1.0) as (service, http):
        missing, headers = await what_never_comes(http, service.key), {"X-API-Key": service.key}
        answers: list[int] = []

        async def wait_for_what_never_comes() -> None:
            answers.append(
                (await http.post("retrieve_future", json={"request_id": missing}, headers=headers)).status_code
            )

        async with anyio.create_task_group() as waiting:
            waiting.start_soon(wait_for_what_never_comes)
            async with anyio.create_task_group() as tasks:
                for pieces in SLOW.values():
                    tasks.start_soon(until_it_ends, http.base_url.port, *pieces)
            assert answers == []
            assert (await shown(http, service.key)).status_code == 200
            waiting.cancel_scope.cancel()


async def test_a_body_that_comes_slowly_but_comes_is_read(tmp_path: Path) -> None:
    async with door(tmp_path, slow_after_s=2.0) as (service, http):

        async def pieces() -> AsyncIterator[bytes]:
            yield b'{"tags": [], "user_metadata": null,'
            for _ in range(8):
                yield b" " * 20_000
                await anyio.sleep(0.35)
            yield b'"sdk_version": "0"}'

        answer = await http.post("create_session", content=pieces(), headers={"X-API-Key": service.key})
        assert answer.status_code == 200


async def test_a_head_without_an_end_ends_all_the_same() -> None:
    async with bare(slow_after_s=600) as (_, port):  # it is not for its slowness
        pieces = [b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(200)]
        # What was answered is lost where more was under way.
        assert (await until_it_ends(port, HEAD, *pieces)).partition(b"\r\n")[0] in (b"", b"HTTP/1.1 400 Bad Request")
