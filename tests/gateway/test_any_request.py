"""Whatever is asked of the APIs of text: an answer or a refusal, and never an error of the server's."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from lorry.wire.codec import decode, encode
from lorry.wire.commands import SampleInput
from lorry.wire.types import SampledSequence, SampleResponse

from .test_templates import CALLED, PLAIN, TOOLS, folders, serving  # noqa: F401  a fixture

SEED = 7
AT_A_TIME = 8
COMPLETIONS: list[dict[str, Any]] = [
    {"model": "m", "prompt": "hacker: n.", "max_tokens": 5, "temperature": 0.5, "stop": ["x", "yz"]},
    {"model": "m", "prompt": [[5, 6, 7], [8, 9]], "max_tokens": 0, "echo": True, "logprobs": 3},
    {"model": "m", "prompt": ["a", "b"], "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
]
CHATS: list[dict[str, Any]] = [
    {"model": "m", "messages": PLAIN, "n": 2, "logprobs": True, "top_logprobs": 2, "seed": 5, "stop": "x"},
    {"model": "m", "messages": CALLED, "tools": TOOLS, "tool_choice": "auto", "stream": True},
    {"model": "m", "messages": PLAIN, "chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 9},
]
TEXT = {"type": "text", "text": "x"}
MESSAGES: list[dict[str, Any]] = [
    {
        "model": "m",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "x"}],
        "stop_sequences": ["y"],
        "top_k": 5,
    },
    {
        "model": "m",
        "max_tokens": 9,
        "system": [TEXT],
        "stream": True,
        "thinking": {"type": "adaptive"},
        "tools": [{"name": "look", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": [TEXT]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "look", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "y"}]},
        ],
    },
]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 1.5, 2**31, 2**63, 10**40, -(10**40), 1e308, "", "x", "\x00", "\ud800", "é" * 50),
    *(
        [],
        {},
        [[]],
        [None],
        {"a": {"b": []}},
        "tinker://x/sampler_weights/y",
        ";",
        "m;tinker://",
        "data:image/png;base64,",
    ),
    *("{{ 7 }}", "<|im_end|><tool_call>", {"type": "text"}, {"role": "user", "content": "x"}, [2**40], "a" * 5000),
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def mutated(chance: random.Random, body: dict[str, Any]) -> bytes:
    body = copy.deepcopy(body)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        *above, last = chance.choice([place for place in places(body) if place] or [("model",)])
        holder: Any = body
        for key in above:
            holder = holder[key]
        match chance.randrange(4):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, dict):
                holder[chance.choice(("x", "type", "role", "content", "name", "stream", "n"))] = chance.choice(ODD)
            case 2 if isinstance(holder, list):
                holder.append(copy.deepcopy(chance.choice(ODD)))
            case _:
                holder[last] = copy.deepcopy(chance.choice(ODD))
    encoded = bytearray(json.dumps(body).encode())
    for _ in range(chance.choice((0, 0, 0, 0, 1, 3))):
        encoded[chance.randrange(len(encoded))] = chance.randrange(256)
    return bytes(encoded)


def answering(chance: random.Random) -> Any:
    """Any tokens, as many as were asked for, as an actor answers."""

    def sample(payload: bytes) -> bytes:
        wanted = decode(payload, SampleInput)
        top, length = wanted.topk_sample_logprobs, wanted.prompt.known_length or 5
        sequences: list[SampledSequence] = []
        for _ in range(wanted.num_samples):
            tokens = [chance.randrange(2060) for _ in range(chance.randrange(12))]
            tops = [[(chance.randrange(2060), -1.0) for _ in range(top)] for _ in tokens] if top else None
            sequences.append(SampledSequence(chance.choice(("stop", "length")), tokens, [-1.0] * len(tokens), tops))
        scores = [None, *[-1.0] * (length - 1)] if wanted.include_prompt_logprobs else None
        return encode(SampleResponse(sequences, scores, prompt_tokens=length))

    return sample


async def ask_for(requests: int, kinds: list[tuple[str, dict[str, Any]]], folder: Path, data: Path) -> dict[int, int]:
    """How often each status came."""
    chance, seen = random.Random(SEED), dict[int, int]()
    todo = [(path, mutated(chance, body)) for path, body in (chance.choice(kinds) for _ in range(requests))]
    async with (
        serving(folder, data, answering(chance)) as (_, url, key),
        httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}, timeout=None) as http,
    ):

        async def work() -> None:
            while todo:
                path, body = todo.pop()
                answer = await http.post(path, content=body)
                assert answer.status_code < 500, (path, body, answer.text)
                assert '"server_error"' not in answer.text and '"api_error"' not in answer.text, (body, answer.text)
                if answer.status_code != 200:
                    assert answer.json()["error"]["message"], (body, answer.text)
                elif answer.headers["content-type"].startswith("text/event-stream"):
                    assert '"error"' in answer.text or answer.text.endswith(("[DONE]\n\n", '"message_stop"}\n\n'))
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1

        async with anyio.create_task_group() as tasks:
            for _ in range(AT_A_TIME):
                tasks.start_soon(work)
    return seen


OPENAI = [("/v1/completions", body) for body in COMPLETIONS] + [("/v1/chat/completions", body) for body in CHATS]
ANTHROPIC = [("/v1/messages", body) for body in MESSAGES] + [
    ("/v1/messages/count_tokens", {"model": "m", "messages": MESSAGES[1]["messages"], "tools": MESSAGES[1]["tools"]})
]


@pytest.mark.parametrize("requests", [200, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("kinds", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
async def test_any_request_is_answered_or_refused(
    requests: int,
    kinds: list[tuple[str, dict[str, Any]]],
    folders: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    seen = await ask_for(requests, kinds, folders["qwen3"], tmp_path)
    assert sum(seen.values()) == requests
    assert seen[200] > requests // 10 and seen[400] > requests // 10
