"""Who reads what is sent of a text slowly, or not at all; and a sampler that the broker has forgotten."""

import json
import socket
from pathlib import Path

import anyio
import httpx
import msgspec
import pytest
from anyio import to_thread
from starlette.requests import ClientDisconnect
from starlette.types import Message

from lorry.gateway.broker import Broker
from lorry.gateway.chat.endpoint import Reply
from lorry.gateway.chat.models import Desk, Meant
from lorry.gateway.config import HttpSettings
from lorry.wire.catalogue_messages import SamplerInfo

from .test_templates import folders, serving  # noqa: F401  a fixture

BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def rest_of(reader: socket.socket) -> bytes:
    received = b""
    try:
        while some := reader.recv(1 << 20):
            received += some
    except ConnectionResetError:
        pass
    return received


async def test_a_reader_that_takes_nothing_is_cut_off_and_costs_nobody_else_anything(
    folders: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_off, write = anyio.Event(), Reply._write  # pyright: ignore[reportPrivateUsage]

    async def watched(reply: Reply, message: Message) -> None:
        try:
            await write(reply, message)
        except ClientDisconnect:
            cut_off.set()
            raise

    monkeypatch.setattr(Reply, "_write", watched)
    async with serving(folders["qwen3"], tmp_path, http=HttpSettings(slow_after_s=0.5)) as (script, url, key):
        script.says = ["many words " * 30_000, "few words"]
        body = json.dumps(BODY | {"stream": True, "logprobs": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n"
        where = httpx.URL(url)
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await to_thread.run_sync(reader.connect, (where.host, where.port))
            reader.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await cut_off.wait()
            async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}, timeout=None) as http:
                answer = await http.post("/v1/chat/completions", json=BODY)
                assert answer.json()["choices"][0]["message"]["content"] == "few words"
            received = await to_thread.run_sync(rest_of, reader)
        assert received and b"[DONE]" not in received


async def test_a_sampler_that_the_broker_has_forgotten_is_made_anew(
    folders: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known, forgotten = Desk.sampler, list[Meant]()

    async def forgotten_once(desk: Desk, broker: Broker, meant: Meant, within_s: float) -> SamplerInfo:
        info = await known(desk, broker, meant, within_s)
        return info if forgotten else msgspec.structs.replace(info, sampler="sampler-of-long-ago")

    monkeypatch.setattr(Desk, "sampler", forgotten_once)
    monkeypatch.setattr(Desk, "forget", lambda desk, broker, meant: forgotten.append(meant))
    async with (
        serving(folders["qwen3"], tmp_path) as (script, url, key),
        httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}, timeout=None) as http,
    ):
        for streams in (False, True):
            forgotten.clear()
            script.says = ["words"]
            answer = await http.post("/v1/chat/completions", json=BODY | {"stream": streams})
            assert answer.status_code == 200 and "words" in answer.text
            assert [meant.name for meant in forgotten] == ["m"]
