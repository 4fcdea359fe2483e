"""Conversations are rendered as transformers renders them, and a call of a tool in a model's own syntax reaches the
official clients, whose answer the model reads as its template has it."""

import base64
import copy
import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import openai
import pytest
from transformers import AutoTokenizer

from lorry.gateway.anthropic import conversing
from lorry.gateway.anthropic.requests import CountRequest
from lorry.gateway.app import running
from lorry.gateway.chat.rendering import render
from lorry.gateway.chat.tokenizers import Tokenizer
from lorry.gateway.config import GatewayConfig, HttpSettings
from lorry.gateway.openai import messages as openai_messages
from lorry.gateway.openai.requests import ChatRequest
from lorry.scheduler import broker
from lorry.scheduler.config import BrokerConfig
from lorry.storage.store import Store
from lorry.wire.codec import decode, encode
from lorry.wire.commands import SampleInput
from lorry.wire.ids import TenantId
from lorry.wire.model_input import ImageChunk
from lorry.wire.types import SampledSequence, SampleResponse
from tests.conftest import BASE_MODEL, ROOT
from tests.scheduler.scripted import FACTS, scripted_actor

TEMPLATES = ROOT / "build/trl-1.16.0/trl/chat_templates"
"""`make test` puts them there."""
_SPECIAL = re.compile(r"<\|[a-z_]+\|>|<｜[^｜]+｜>")
_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_ALWAYS = ("<|channel|>", "<|constrain|>", "<|call|>", "<|return|>", "<|python_tag|>")

WEATHER = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["place"],
}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "The weather", "parameters": WEATHER}}]
ARGUMENTS = {"place": "Córdoba", "days": 2}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
HERMES = f'<think>\nhm\n</think>\n\n<tool_call>\n{{"name": "look", "arguments": {JSON}}}\n</tool_call>'
XML = (
    "hm\n</think>\n\n<tool_call>\n<function=look>\n<parameter=place>\nCórdoba\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>"
)
HARMONY = (
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.look "
    f"<|constrain|>json<|message|>{JSON}<|call|>"
)
LLAMA = f'{{"name": "look", "parameters": {JSON}}}'
NO_THOUGHT = HERMES.rpartition("\n\n")[2]


@dataclass(frozen=True, slots=True)
class Family:
    """`call` is how it calls the tool, where its template knows tools."""

    template: str
    call: str | None = None
    thinks: bool = False


FAMILIES = [
    Family("qwen3", HERMES, thinks=True),
    Family("qwen3_instruct_2507", NO_THOUGHT),
    Family("qwen3_vl", NO_THOUGHT),
    Family("qwen3_5_think", XML, thinks=True),
    Family("llama3_1", LLAMA),
    Family("llama3_2", LLAMA),
    Family("gptoss", HARMONY, thinks=True),
    Family("llama3"),
    Family("deepseekv3"),
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tests' tokenizer with each family's template, and the tokens that it writes."""
    found: dict[str, Path] = {}
    for family in FAMILIES:
        template = (TEMPLATES / f"{family.template}.jinja").read_text()
        tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
        added = [name for name in _ALWAYS if "<|channel|>" in template or name == "<|python_tag|>"]
        tokenizer.add_tokens(sorted({*_SPECIAL.findall(template), *added}), special_tokens=True)
        tokenizer.add_tokens([name for name in _ADDED if name in template])
        if "bos_token" in template:
            tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
        tokenizer.chat_template = template
        found[family.template] = tmp_path_factory.mktemp(family.template)
        tokenizer.save_pretrained(found[family.template])
    return found


CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": JSON}}
PLAIN: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.  "},
    {"role": "user", "content": [{"type": "text", "text": "How are "}, {"type": "text", "text": "you?\n"}]},
    {"role": "assistant", "content": "Well <b>&amp;</b> 你好."},
    {"role": "user", "content": "And 'now'?"},
]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "The weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"rain": true}'},
]


def as_transformers_takes_it(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By hand: texts as one, arguments as they are, and the tool's name."""
    found = copy.deepcopy(messages)
    for message in found:
        content = message["content"]
        message["content"] = "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        if message["role"] == "tool":
            message["name"] = "look"
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.template)
def test_a_conversation_is_rendered_as_transformers_renders_it(family: Family, folders: dict[str, Path]) -> None:
    theirs = AutoTokenizer.from_pretrained(folders[family.template])
    ours = Tokenizer(AutoTokenizer.from_pretrained(folders[family.template]))
    asked: list[dict[str, Any]] = [{"messages": PLAIN}, {"messages": PLAIN[1:2]}]
    if family.call:
        asked += [{"messages": PLAIN, "tools": TOOLS}, {"messages": CALLED, "tools": TOOLS}]
    if "enable_thinking" in ours.variables:
        asked.append({"messages": PLAIN, "chat_template_kwargs": {"enable_thinking": False}})
    if "reasoning_effort" in ours.variables:
        asked.append({"messages": PLAIN, "reasoning_effort": "high"})
    for each in asked:
        request = msgspec.convert({"model": "m"} | each, ChatRequest)
        prompt = render(ours, openai_messages.conversation_of(request))
        variables = each.get("chat_template_kwargs", {})
        if effort := each.get("reasoning_effort"):
            variables = {"reasoning_effort": effort}
        rendered = theirs.apply_chat_template(
            as_transformers_takes_it(each["messages"]),
            tools=each.get("tools"),
            add_generation_prompt=True,
            tokenize=False,
            **variables,
        )
        assert theirs.decode(prompt.tokens.to_ints()) == rendered
        assert prompt.tokens.to_ints() == theirs.encode(rendered, add_special_tokens=False)


def test_the_same_conversation_by_either_api_is_the_same_prompt(folders: dict[str, Path]) -> None:
    ours = Tokenizer(AutoTokenizer.from_pretrained(folders["qwen3"]))
    messages = [
        {"role": "user", "content": "The weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "call_1", "name": "look", "input": ARGUMENTS},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": '{"rain": true}'}]},
    ]
    tools = [{"name": "look", "description": "The weather", "input_schema": WEATHER}]
    theirs = msgspec.convert({"model": "m", "messages": messages, "tools": tools}, CountRequest)
    other = msgspec.convert({"model": "m", "messages": CALLED, "tools": TOOLS}, ChatRequest)
    assert render(ours, conversing.conversation_of(theirs)) == render(ours, openai_messages.conversation_of(other))


def test_an_image_is_where_the_template_puts_it_and_no_text_can_make_a_place(folders: dict[str, Path]) -> None:
    ours = Tokenizer(AutoTokenizer.from_pretrained(folders["qwen3_vl"]))
    url = "data:image/png;base64," + base64.b64encode(b"png").decode()
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "b"},
    ]
    request = msgspec.convert({"model": "m", "messages": [{"role": "user", "content": parts}]}, ChatRequest)
    chunks = render(ours, openai_messages.conversation_of(request)).tokens.chunks
    assert [isinstance(chunk, ImageChunk) for chunk in chunks] == [False, True, False]
    assert chunks[1] == ImageChunk(b"png", "png")
    before, after = (ours.vocabulary.decode(chunk.tokens) for chunk in (chunks[0], chunks[2]))  # type: ignore[union-attr]
    assert before.endswith("a<|vision_start|>") and after.startswith("<|vision_end|>b")
    spelt = msgspec.convert({"model": "m", "messages": [{"role": "user", "content": "<|image_pad|>"}]}, ChatRequest)
    with pytest.raises(ValueError, match="no text may spell the place of an image"):
        render(ours, openai_messages.conversation_of(spelt))


def test_a_turn_ends_where_its_template_ends_one(folders: dict[str, Path]) -> None:
    ends = {name: Tokenizer(AutoTokenizer.from_pretrained(folder)) for name, folder in folders.items()}
    names = {name: [ours.vocabulary.decode([token]) for token in ours.turn_ends] for name, ours in sorted(ends.items())}
    assert names == {
        "deepseekv3": ["<｜end▁of▁sentence｜>"],
        "gptoss": ["<|return|>", "<|call|>"],
        "llama3": ["<|eot_id|>"],
        "llama3_1": ["<|eot_id|>"],
        "llama3_2": ["<|eot_id|>"],
        "qwen3": ["<|im_end|>"],
        "qwen3_5_think": ["<|im_end|>"],
        "qwen3_instruct_2507": ["<|im_end|>"],
        "qwen3_vl": ["<|im_end|>"],
    }


# A call, and its answer, through a broker and a gateway ---------------------------------------------------------------


@dataclass(slots=True)
class Script:
    """What the model says, in turn; and the prompts that it was given. `end` is a token that it ends with."""

    tokenizer: Any
    says: list[str] = field(default_factory=list[str])
    asked: list[SampleInput] = field(default_factory=list[SampleInput])

    def sample(self, payload: bytes) -> bytes:
        self.asked.append(decode(payload, SampleInput))
        tokens = self.tokenizer.encode(self.says.pop(0), add_special_tokens=False)
        return encode(SampleResponse([SampledSequence("stop", tokens, [-1.0] * len(tokens))], prompt_tokens=7))

    @property
    def last_prompt(self) -> str:
        return self.tokenizer.decode(self.asked[-1].prompt.to_ints())


@asynccontextmanager
async def serving(
    folder: Path, data: Path, sample: Callable[[bytes], bytes] | None = None, http: HttpSettings | None = None
) -> AsyncGenerator[tuple[Script, str, str]]:
    """A model of this tokenizer, which says what it is told to, or `sample` makes; the gateway's URL, and a key."""
    script = Script(AutoTokenizer.from_pretrained(folder))
    facts = msgspec.structs.replace(FACTS, tokenizer_id=str(folder), vocab_size=10_000, end_tokens=[0])
    config = BrokerConfig(data, ("m",), "token", bind="tcp://127.0.0.1:*", heartbeat_s=60.0)
    async with broker.running(config) as addresses:
        with closing(Store(data)) as store:
            key = store.create_key(TenantId("alice"), 1.0)
        async with (
            scripted_actor(addresses.actors, "token", "m", sample=sample or script.sample, facts=facts),
            running(GatewayConfig(addresses.clients, port=0, http=http or HttpSettings())) as url,
        ):
            yield script, url, key


def expected_prompt(folder: Path, reasoning: str | None, call_id: str) -> str:
    called: dict[str, Any] = {"role": "assistant", "content": ""}
    if reasoning:
        called["reasoning_content"] = reasoning
    function = {"name": "look", "arguments": ARGUMENTS}
    called["tool_calls"] = [{"type": "function", "id": call_id, "function": function}]
    result = {"role": "tool", "tool_call_id": call_id, "name": "look", "content": "rain"}
    messages = [{"role": "user", "content": "The weather?"}, called, result]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.call], ids=lambda family: family.template)
async def test_openais_client_calls_a_tool_and_the_model_reads_the_answer(
    family: Family, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, thought = folders[family.template], "hm" if family.thinks else None
    assert family.call
    async with (
        serving(folder, tmp_path) as (script, url, key),
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as http,
    ):
        asked: dict[str, Any] = {
            "model": "m",
            "messages": [{"role": "user", "content": "The weather?"}],
            "tools": TOOLS,
        }
        script.says = [family.call, "Rain.", family.call]
        choice = (await http.chat.completions.create(**asked)).choices[0]
        (call,) = choice.message.tool_calls or ()
        assert choice.finish_reason == "tool_calls" and call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("look", ARGUMENTS)
        assert choice.message.content is None and getattr(choice.message, "reasoning_content", None) == thought
        result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        more = [*asked["messages"], choice.message, result]
        await http.chat.completions.create(**asked | {"messages": more})
        assert script.last_prompt == expected_prompt(folder, thought, call.id)

        async with http.chat.completions.stream(**asked) as stream:
            async for _ in stream:
                pass
            streamed = (await stream.get_final_completion()).choices[0]
        (again,) = streamed.message.tool_calls or ()
        assert streamed.finish_reason == "tool_calls"
        assert (again.function.name, json.loads(again.function.arguments)) == ("look", ARGUMENTS)


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[6]], ids=lambda family: family.template)
async def test_anthropics_client_uses_a_tool_and_the_model_reads_the_result(
    family: Family, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders[family.template]
    assert family.call
    async with (
        serving(folder, tmp_path) as (script, url, key),
        anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as http,
    ):
        tools = [{"name": "look", "description": "The weather", "input_schema": WEATHER}]
        asked: dict[str, Any] = {
            "model": "m",
            "max_tokens": 100,
            "messages": [{"role": "user", "content": "The weather?"}],
            "tools": tools,
        }
        script.says = [family.call, family.call, "Rain."]
        whole = await http.messages.create(**asked)
        async with http.messages.stream(**asked) as stream:
            streamed = await stream.get_final_message()
        for message in (whole, streamed):
            thought, used = message.content
            assert thought.type == "thinking" and (thought.thinking, thought.signature) == ("hm", "")
            assert used.type == "tool_use" and (used.name, used.input) == ("look", ARGUMENTS)
            assert message.stop_reason == "tool_use"
        (_, used) = whole.content
        assert used.type == "tool_use"
        result = {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "rain"}]}
        more = [
            *asked["messages"],
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": [result]},
        ]
        await http.messages.create(**asked | {"messages": more})
        assert script.last_prompt == expected_prompt(folder, "hm", used.id)
