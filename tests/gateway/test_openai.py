"""OpenAI's own client, unchanged, and what it is told."""

import base64
from collections.abc import Callable
from typing import Any

import anyio
import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from transformers import AutoTokenizer

import lorry
from tests.conftest import BASE_MODEL, MODEL, standing_still

from .conftest import Tenant
from .refusals import Run
from .test_admin import boss, make_key  # noqa: F401  fixtures
from .test_limits import limited  # noqa: F401  a fixture

TURNS: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hacker: n."}]
ASKED: dict[str, Any] = {"model": MODEL, "messages": TURNS, "max_tokens": 12, "temperature": 0}
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
PROMPT = "hacker: n. A person who"
AT_A_TIME = 64


def client(tenant: Tenant, prefix: str = "/v1") -> openai.OpenAI:
    return openai.OpenAI(base_url=tenant.server.url + prefix, api_key=tenant.key, max_retries=0, timeout=None)


def patient(tenant: Tenant) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{tenant.server.url}/v1", api_key=tenant.key, max_retries=0, timeout=None)


@pytest.mark.parametrize("prefix", ["/v1", "/services/tinker-prod/oai/api/v1"])
def test_what_is_streamed_is_what_is_answered_whole(tenant: Tenant, prefix: str) -> None:
    with client(tenant, prefix) as http:
        whole = http.chat.completions.create(**ASKED, n=2, logprobs=True, top_logprobs=2)
        texts, names, ends, usage = ["", ""], [[], []], ["", ""], None
        for chunk in http.chat.completions.create(
            **ASKED, n=2, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                names[choice.index] += [t.token for t in (choice.logprobs.content or [])] if choice.logprobs else []
                ends[choice.index] = choice.finish_reason or ""
    for one in whole.choices:
        assert one.logprobs and one.logprobs.content
        assert one.message.content == texts[one.index]
        assert [token.token for token in one.logprobs.content] == names[one.index]
        assert one.finish_reason == ends[one.index] == "length"
        for token in one.logprobs.content:
            assert len(token.top_logprobs) == 2 and token.logprob == token.top_logprobs[0].logprob
    assert whole.usage and usage
    assert whole.usage.completion_tokens == usage.completion_tokens == 24
    assert whole.usage.prompt_tokens == usage.prompt_tokens == 14


async def test_sixty_four_at_a_time_are_told_what_one_is_told(tenant: Tenant) -> None:
    found: list[str | None] = []

    async def ask(http: openai.AsyncOpenAI, streams: bool) -> None:
        if not streams:
            found.append((await http.chat.completions.create(**ASKED)).choices[0].message.content)
            return
        pieces = [
            chunk.choices[0].delta.content async for chunk in await http.chat.completions.create(**ASKED, stream=True)
        ]
        found.append("".join(piece or "" for piece in pieces))

    async with patient(tenant) as http, anyio.create_task_group() as tasks:
        for i in range(AT_A_TIME):
            tasks.start_soon(ask, http, i % 2 == 0)
    with client(tenant) as one:
        assert set(found) == {one.chat.completions.create(**ASKED).choices[0].message.content}
    assert len(found) == AT_A_TIME


async def test_a_prompt_that_is_scored_has_the_models_own_logprobs(tenant: Tenant) -> None:
    tokens: list[int] = AutoTokenizer.from_pretrained(BASE_MODEL).encode(PROMPT)
    async with lorry.connect(tenant.server.address, api_key=tenant.key) as service:
        sampler = await service.create_sampling_client_async(base_model=MODEL)
        expected = await sampler.compute_logprobs_async(lorry.ModelInput.from_ints(tokens))
    async with patient(tenant) as http:
        for prompt in (PROMPT, tokens):
            for max_tokens, top in ((0, 0), (0, 3), (1, 1)):
                (choice,) = (
                    await http.completions.create(
                        **GREEDY, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=top
                    )
                ).choices
                scores = choice.logprobs
                assert scores and scores.token_logprobs and scores.tokens and scores.text_offset
                assert scores.token_logprobs[0] is None
                assert scores.token_logprobs[1 : len(tokens)] == pytest.approx(expected[1:], abs=1e-4)
                assert len(scores.tokens) == len(tokens) + max_tokens
                assert choice.text.startswith(PROMPT) and "".join(scores.tokens) == choice.text
                places = [len("".join(scores.tokens[:i])) for i in range(len(scores.tokens))]
                assert scores.text_offset == places
                if top:
                    assert scores.top_logprobs and all(len(each) >= top for each in scores.top_logprobs[1:])
                    for each, name, logprob in list(
                        zip(scores.top_logprobs, scores.tokens, scores.token_logprobs, strict=True)
                    )[1:]:
                        assert each[name] == logprob


async def test_many_prompts_are_answered_in_their_order_streamed_or_not(tenant: Tenant) -> None:
    prompts = [f"{word}: n." for word in ("hacker", "kluge", "foo", "bar", "lorry")]
    asked = {**GREEDY, "max_tokens": 6, "n": 2}
    async with patient(tenant) as http:
        alone = [(await http.completions.create(**asked, prompt=prompt)).choices[0].text for prompt in prompts]
        whole = await http.completions.create(**asked, prompt=prompts)
        pieces = [""] * 10
        async for chunk in await http.completions.create(**asked, prompt=prompts, stream=True, echo=True):
            for choice in chunk.choices:
                pieces[choice.index] += choice.text
    assert [choice.index for choice in whole.choices] == list(range(10))
    assert [choice.text for choice in whole.choices] == [text for text in alone for _ in range(2)]
    assert pieces == [prompt + text for prompt, text in zip(prompts, alone, strict=True) for _ in range(2)]


def test_text_ends_before_a_stop(tenant: Tenant) -> None:
    with client(tenant) as http:
        full = http.completions.create(**GREEDY, prompt=PROMPT, max_tokens=20).choices[0].text
        stop = full[len(full) // 2 :][:3]
        for streams in (False, True):
            asked = {**GREEDY, "prompt": PROMPT, "max_tokens": 20, "stop": [stop, "\x00never"]}
            if streams:
                chunks = list(http.completions.create(**asked, stream=True))
                text = "".join(chunk.choices[0].text for chunk in chunks)
                assert chunks[-1].choices[0].finish_reason == "stop"
            else:
                choice = http.completions.create(**asked).choices[0]
                text = choice.text
                assert choice.finish_reason == "stop"
            assert text == full[: full.index(stop)]


def test_seeds_repeat_and_penalties_that_are_off_are_taken(tenant: Tenant) -> None:
    asked = {
        **ASKED,
        "temperature": 1.0,
        "seed": -7,
        "frequency_penalty": 0,
        "logit_bias": {},
        "user": "x",
        "store": False,
    }
    with client(tenant) as http:
        assert len({http.chat.completions.create(**asked).choices[0].message.content for _ in range(3)}) == 1


# Models ---------------------------------------------------------------------------------------------------------------


def test_weights_are_asked_for_by_their_path_which_means_what_it_leads_to_now(
    new_tenant: Callable[[], Tenant],
) -> None:
    tenant, other = new_tenant(), new_tenant()
    asked = {"temperature": 0, "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}

    def score(http: openai.OpenAI, model: str) -> list[float | None] | None:
        scores = http.completions.create(**asked, model=model).choices[0].logprobs
        assert scores
        return scores.token_logprobs

    with tenant.http() as plain, client(tenant) as http, client(other) as others:
        run = Run(tenant, plain)
        path = run.saved("save_weights_for_sampler", "mine")
        before = score(http, path)
        assert before == score(http, f"{MODEL};{path}")
        assert run.goes_on()
        assert run.saved("save_weights_for_sampler", "mine") == path
        after = score(http, path)
        assert after != before
        assert {model.id for model in http.models.list()} == {MODEL, path}
        assert http.models.retrieve(path).id == path
        assert [model.id for model in others.models.list()] == [MODEL]
        for model in (path, f"{MODEL};{path}"):
            with pytest.raises(openai.NotFoundError) as refused:
                score(others, model)
            assert refused.value.code == "model_not_found" and refused.value.param == "model"
        with pytest.raises(openai.NotFoundError):
            others.models.retrieve(path)
        with pytest.raises(openai.BadRequestError, match="and not of"):
            score(http, f"another;{path}")


# What is refused ------------------------------------------------------------------------------------------------------

PIXEL = base64.b64encode(b"no image").decode()
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT: list[tuple[dict[str, Any], str]] = [
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict"),
    ({"tools": [TOOL]}, "tools"),
    ({"functions": []}, "functions"),
    ({"audio": {}}, "audio"),
    ({"store": True}, "store"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"max_completion_tokens": 3}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"stop": ["x"] * 17}, "len(stop)"),
    ({"stop": ""}, "stop"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ({"reasoning_effort": "high"}, "chat_template_kwargs"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
        "messages[0].content[0].image_url.url",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}],
                }
            ]
        },
        "messages",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1"}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
]
COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"logprobs": 21}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 0, "echo": True, "n": 2}, "n"),
    ({"stream": True, "echo": True, "logprobs": 1}, "stream"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "len(prompt)"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [2**40]}, "prompt[0]"),
]


def test_what_is_not_supported_is_refused_by_its_name(tenant: Tenant) -> None:
    with client(tenant) as http:
        for change, param in CHAT:
            with pytest.raises(openai.BadRequestError) as refused:
                http.chat.completions.create(model=MODEL, messages=TURNS, extra_body={"max_tokens": 4} | change)
            assert refused.value.param == param, (change, refused.value.message)
        for change, param in COMPLETION:
            with pytest.raises(openai.BadRequestError) as refused:
                http.completions.create(model=MODEL, prompt="x", extra_body={"max_tokens": 4} | change)
            assert refused.value.param == param, (change, refused.value.message)


def test_errors_are_in_openais_words(tenant: Tenant) -> None:
    with client(tenant) as http:
        with pytest.raises(openai.NotFoundError) as unknown:
            http.chat.completions.create(**ASKED | {"model": "gpt-4"})
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.AuthenticationError) as wrong:
            http.with_options(api_key="tml-none").models.list()
        assert wrong.value.code == "invalid_api_key"
    with httpx.Client(base_url=tenant.server.url, headers={"Authorization": f"Bearer {tenant.key}"}) as plain:
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/chat/completions", 405),
            ("DELETE", "/v1/models", 405),
        ):
            answer = plain.request(method, path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
        for body in (b"", b"{", b"[]", b'{"model": NaN}', b"\xff", b"[" * 100_000):
            answer = plain.post("/v1/chat/completions", content=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body"), answer.text
        too_much = plain.post("/v1/completions", content=b" " * (65 << 20))
        assert (too_much.status_code, too_much.json()["error"]["code"]) == (413, "request_too_large")


async def test_who_hangs_up_is_not_sampled_for(tenant: Tenant) -> None:
    async with httpx.AsyncClient(
        base_url=tenant.server.url, headers={"Authorization": f"Bearer {tenant.key}"}, timeout=None
    ) as http:
        body = ASKED | {"max_tokens": 2000}
        with standing_still(tenant.server):
            async with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
                first = await anext(answer.aiter_lines())
                assert '"role":"assistant"' in first, "it is told that it was accepted before anything is sampled"
                assert (await http.get("/api/v1/jobs")).json()["total"] == 1
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: http.post("/v1/chat/completions", json=body))
                while (await http.get("/api/v1/jobs")).json()["total"] < 2:
                    pass
                tasks.cancel_scope.cancel()
        while (await http.get("/api/v1/jobs")).json()["total"]:
            pass
        usage = (await http.get("/api/v1/billing/usage/events")).text
    assert '"tokens":2000' not in usage


def test_who_comes_too_fast_is_told_when_to_come_again(limited: Callable[..., Tenant]) -> None:  # noqa: F811
    with client(limited("tess", requests_per_s=0.01)) as http:
        with pytest.raises(openai.RateLimitError) as refused:
            for _ in range(3):
                http.chat.completions.create(**ASKED)
        assert int(refused.value.response.headers["retry-after"]) > 1
        assert refused.value.type == "rate_limit_error"


async def test_text_is_told_while_more_is_made(tenant: Tenant) -> None:
    async with patient(tenant) as http:
        stream = await http.completions.create(**GREEDY, prompt=PROMPT, max_tokens=3000, stream=True)
        assert (await anext(aiter(stream))).choices[0].finish_reason is None
        async with httpx.AsyncClient(base_url=tenant.server.url, headers={"X-API-Key": tenant.key}) as plain:
            assert (await plain.get("/api/v1/jobs")).json()["total"] == 1, "it is not over"
        await stream.close()


def test_what_goes_wrong_after_the_first_event_is_an_event(tenant: Tenant) -> None:
    with client(tenant) as http, pytest.raises(openai.APIError, match="token ids from 0 below 2048"):
        list(http.completions.create(model=MODEL, prompt=[99_999], max_tokens=4, stream=True))
