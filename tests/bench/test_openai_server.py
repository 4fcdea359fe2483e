"""A server of OpenAI's completions that answers in known pieces, by the official client over HTTP."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from lorry.bench.drive import drive
from lorry.bench.openai_server import OpenAIServer
from lorry.bench.records import Record
from lorry.bench.workload import Closed, Sample, Tenant, Train, Workload
from lorry.wire.errors import AuthenticationError, InvalidRequestError

SAMPLE = Sample(prompt_tokens=7, max_tokens=5, samples=2, base=True)


class Server:
    def __init__(self, *, with_usage: bool = True) -> None:
        self.asked = list[dict[str, Any]]()
        self.keys = set[str | None]()
        self._with_usage = with_usage
        self.app = FastAPI()
        self.app.post("/v1/completions")(self.complete)

    async def complete(self, request: Request) -> Any:
        asked = await request.json()
        self.asked.append(asked)
        self.keys.add(request.headers.get("Authorization"))
        if len(self.asked) == 2:
            return JSONResponse({"error": {"message": "too busy"}}, 503)
        return StreamingResponse(self._chunks(asked), media_type="text/event-stream")

    async def _chunks(self, asked: dict[str, Any]) -> AsyncGenerator[str]:
        head = {"id": "1", "object": "text_completion", "created": 1, "model": asked["model"]}
        for _ in range(3):
            for index in range(asked["n"]):
                choice = {"index": index, "text": "a", "finish_reason": None, "logprobs": None}
                yield f"data: {json.dumps(head | {'choices': [choice]})}\n\n"
        if self._with_usage:
            usage = {"prompt_tokens": 7, "completion_tokens": 10, "total_tokens": 17}
            yield f"data: {json.dumps(head | {'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


@asynccontextmanager
async def serving(server: Server) -> AsyncGenerator[str]:
    web = uvicorn.Server(uvicorn.Config(server.app, port=0, log_level="error", lifespan="off"))
    socket = web.config.bind_socket()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(web.serve, [socket])
        yield f"http://127.0.0.1:{socket.getsockname()[1]}/v1"
        web.should_exit = True


async def driven(server: Server, requests: int = 4) -> list[Record]:
    """A tenant who has one request under way until so many have come."""
    tenant = Tenant("a", [SAMPLE], Closed())
    workload = Workload("w", "some-model", [tenant], warm_up_s=0, duration_s=10_000, vocab=50)
    records = list[Record]()
    async with serving(server) as url:
        with anyio.CancelScope() as enough:

            def tell(record: Record) -> None:
                records.append(record)
                if len(records) == requests:
                    enough.cancel()

            await drive(workload, OpenAIServer(url, workload.model, {"a": "key-of-a"}), tell)
    return records


async def test_a_stream_is_timed_token_by_token_and_a_refusal_is_counted() -> None:
    server = Server()
    records = await driven(server)
    assert [record.error for record in records[:4]] == [None, "InternalServerError", None, None]
    for record in (records[0], records[2]):
        assert record.tokens == 10
        assert len(record.token_s) == 3 and record.token_s == sorted(record.token_s)
        assert record.sent_s <= record.token_s[0] <= record.token_s[-1] <= record.done_s
    assert server.keys == {"Bearer key-of-a"}
    first = server.asked[0]
    assert (len(first["prompt"]), first["max_tokens"], first["n"], first["model"]) == (7, 5, 2, "some-model")
    assert all(0 <= token < 50 for token in first["prompt"])


async def test_without_a_count_of_the_servers_chunks_are_counted() -> None:
    assert [record.tokens for record in await driven(Server(with_usage=False), 1)] == [6]


@pytest.mark.parametrize("work", [Train(), Sample()], ids=["training", "a run's own weights"])
async def test_who_wants_more_than_it_has_is_refused_before_anything_is_sent(work: Train | Sample) -> None:
    server = OpenAIServer("http://127.0.0.1:1/v1", "m", {"": "key"})
    with pytest.raises(InvalidRequestError, match=r"tenants\['a'\]\.work has more than samples with base = true"):
        async with server.seat(Tenant("a", [SAMPLE, work]), "a"):
            pass


async def test_a_tenant_without_a_key_is_refused() -> None:
    with pytest.raises(AuthenticationError, match="no key is given for the tenant 'b'"):
        async with OpenAIServer("http://127.0.0.1:1/v1", "m", {"a": "key"}).seat(Tenant("b", [SAMPLE]), "b"):
            pass
