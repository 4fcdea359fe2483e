"""Anthropic's own client, unchanged, and what it is told."""

from typing import Any

import anthropic
import anyio
import httpx
import pytest

from tests.conftest import MODEL

from .conftest import Tenant

ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 12,
    "extra_body": {"temperature": 0},
    "system": [{"type": "text", "text": "Define."}],
    "messages": [{"role": "user", "content": "hacker: n."}],
}
AT_A_TIME = 64


def client(tenant: Tenant, prefix: str = "") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=tenant.server.url + prefix, api_key=tenant.key, max_retries=0, timeout=None)


def patient(tenant: Tenant) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=tenant.server.url, auth_token=tenant.key, max_retries=0, timeout=None)


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@pytest.mark.parametrize("prefix", ["", "/services/tinker-prod/anthropic/api"])
def test_what_is_streamed_is_what_is_answered_whole(tenant: Tenant, prefix: str) -> None:
    with client(tenant, prefix) as http:
        whole = http.messages.create(**ASKED)
        with http.messages.stream(**ASKED) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()
        counted = http.messages.count_tokens(model=MODEL, messages=ASKED["messages"], system=ASKED["system"])
    assert text_of(whole) == text_of(streamed) != ""
    assert whole.stop_reason == streamed.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == streamed.usage.output_tokens == 12
    for usage in (whole.usage, streamed.usage):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens
    assert (kinds[:2], kinds[-1]) == (["message_start", "content_block_start"], "message_stop")


async def test_sixty_four_at_a_time_are_told_what_one_is_told(tenant: Tenant) -> None:
    found: list[str] = []

    async def ask(http: anthropic.AsyncAnthropic, streams: bool) -> None:
        if not streams:
            found.append(text_of(await http.messages.create(**ASKED)))
            return
        async with http.messages.stream(**ASKED) as stream:
            found.append(await stream.get_final_text())

    async with patient(tenant) as http, anyio.create_task_group() as tasks:
        for i in range(AT_A_TIME):
            tasks.start_soon(ask, http, i % 2 == 0)
    with client(tenant) as one:
        assert set(found) == {text_of(one.messages.create(**ASKED))}
    assert len(found) == AT_A_TIME


def test_a_stop_sequence_is_told_and_text_ends_before_it(tenant: Tenant) -> None:
    with client(tenant) as http:
        full = text_of(http.messages.create(**ASKED))
        stop = full[len(full) // 2 :][:3]
        whole = http.messages.create(**ASKED, stop_sequences=["\x00never", stop])
        with http.messages.stream(**ASKED, stop_sequences=["\x00never", stop]) as stream:
            streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
        assert text_of(message) == full[: full.index(stop)]


def test_an_assistants_last_message_is_gone_on_with(tenant: Tenant) -> None:
    with client(tenant) as http:
        whole = http.messages.create(**ASKED)
        words = text_of(whole)
        begun = [*ASKED["messages"], {"role": "assistant", "content": words[:5]}]
        counted = http.messages.count_tokens(model=MODEL, messages=begun, system=ASKED["system"])
        before = http.messages.count_tokens(model=MODEL, messages=ASKED["messages"], system=ASKED["system"])
        assert before.input_tokens < counted.input_tokens <= before.input_tokens + 5
        assert text_of(http.messages.create(**ASKED | {"messages": begun}))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "a budget cannot be held"),
    ({"tool_choice": {"type": "any"}}, "tool_choice.type is 'any'"),
    ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.type is 'tool'"),
    (
        {
            "tools": [{"name": "f", "input_schema": {}}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
        "disable_parallel_tool_use",
    ),
    ({"tools": [{"name": "f", "input_schema": {}}]}, "names no tools"),
    ({"tools": [{"name": "f", "input_schema": {}, "type": "bash_20250124"}]}, "tools[0].type is 'bash_20250124'"),
    ({"mcp_servers": []}, "mcp_servers is not served"),
    ({"temperature": 1.5}, "temperature is 1.5"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"stop_sequences": [""]}, "stop_sequences is ''"),
    ({"messages": []}, "messages is []"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role is 'system'"),
    ({"messages": [{"role": "assistant", "content": []}]}, "messages[0].content ends with no text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]},
        "messages[0].content[0].source.type is 'url', expected base64",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/gif", "data": ""}}],
                }
            ]
        },
        "messages[0].content[0].source is 'image/gif'",
    ),
]


def test_what_is_not_supported_is_refused_by_its_name(tenant: Tenant) -> None:
    with client(tenant) as http:
        for change, said in REFUSED:
            with pytest.raises(anthropic.BadRequestError) as refused:
                http.messages.create(**ASKED | {"extra_body": change})
            assert said in refused.value.message, (change, refused.value.message)


def test_errors_are_in_anthropics_words(tenant: Tenant) -> None:
    with client(tenant) as http:
        with pytest.raises(anthropic.NotFoundError, match="there is no model 'claude'"):
            http.messages.create(**ASKED | {"model": "claude"})
        with pytest.raises(anthropic.AuthenticationError, match="no key of this server"):
            http.with_options(api_key="tml-none").messages.create(**ASKED)
    with httpx.Client(base_url=tenant.server.url, headers={"X-API-Key": tenant.key}) as plain:
        for method, path, status, kind in (
            ("GET", "/v1/messages", 405, "invalid_request_error"),
            ("GET", "/v1/messages/batches", 404, "not_found_error"),
            ("GET", "/services/tinker-prod/anthropic/api/v1/nothing", 404, "not_found_error"),
        ):
            answer = plain.request(method, path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
            assert answer.json()["type"] == "error"
        answer = plain.post("/v1/messages", content=b"{")
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
