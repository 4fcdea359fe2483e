"""OpenAI's messages and tools as a conversation. Pure."""

import re
from typing import Any

from ...wire.errors import InvalidRequestError
from ..chat.conversation import (
    Conversation,
    Message,
    Part,
    TextPart,
    Tool,
    ToolCall,
    arguments_of,
    image_of,
    with_names,
)
from ..chat.rendering import plain_variables
from ..errors import NotSupportedError
from . import requests as openai

_DATA = re.compile(r"data:([^;,]*);base64,(.*)", re.DOTALL)


def conversation_of(request: openai.ChatRequest) -> Conversation:
    """Raises InvalidRequestError and NotSupportedError naming the field."""
    check(request)
    messages = [_message(f"messages[{i}]", message) for i, message in enumerate(request.messages)]
    tools = request.tools if request.tool_choice != "none" else None
    variables = plain_variables(request.chat_template_kwargs, reasoning_effort=request.reasoning_effort)
    return Conversation(tuple(with_names(messages)), tuple(map(_tool, tools or ())), variables)


def check(request: openai.ChatRequest) -> None:
    """What cannot be promised is refused."""
    _refuse_unless(request.tool_choice in (None, "auto", "none"), "tool_choice", request.tool_choice, "auto or none")
    parallel = request.parallel_tool_calls is not False or not request.tools
    _refuse_unless(parallel, "parallel_tool_calls", False, "true")
    kind = request.response_format.type if request.response_format else "text"
    _refuse_unless(kind == "text", "response_format.type", kind, "text")
    _refuse_unless(not request.store, "store", request.store, "false, for Lorry keeps no conversations")
    for i, tool in enumerate(request.tools or ()):
        strict = tool.function.strict
        _refuse_unless(not strict, f"tools[{i}].function.strict", strict, "false: models write what they write")
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequestError.of("top_logprobs", request.top_logprobs, "logprobs: true as well")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise InvalidRequestError.of("max_tokens", request.max_tokens, "one of it and max_completion_tokens")


def _refuse_unless(fine: bool, field: str, value: object, expected: str) -> None:
    if not fine:
        raise NotSupportedError(f"{field} is {value!r}, expected {expected}", field=field)


def _message(where: str, message: openai.Message) -> Message:
    match message:
        case openai.SystemMessage() | openai.DeveloperMessage():
            return Message("system", _texts(message.content), name=message.name)
        case openai.UserMessage():
            return Message("user", _parts(f"{where}.content", message.content), name=message.name)
        case openai.ToolMessage():
            return Message("tool", _texts(message.content), answers=message.tool_call_id, name=message.name)
        case openai.AssistantMessage():
            calls = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls or ())]
            reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
            return Message("assistant", _texts(message.content or ""), reasoning, tuple(calls), name=message.name)


def _texts(content: openai.Texts) -> tuple[Part, ...]:
    return (TextPart(content),) if isinstance(content, str) else tuple(TextPart(part.text) for part in content)


def _parts(where: str, content: str | list[openai.TextPart | openai.ImagePart]) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (TextPart(content),)
    return tuple(_part(f"{where}[{i}]", part) for i, part in enumerate(content))


def _part(where: str, part: openai.TextPart | openai.ImagePart) -> Part:
    if isinstance(part, openai.TextPart):
        return TextPart(part.text)
    where = f"{where}.image_url.url"
    if (data := _DATA.fullmatch(part.image_url.url)) is None:
        raise InvalidRequestError.of(where, part.image_url.url, "data:image/png;base64,… : no address is fetched")
    return image_of(where, data[1], data[2])


def _call(where: str, call: openai.ToolCall) -> ToolCall:
    arguments = arguments_of(f"{where}.function.arguments", call.function.arguments)
    return ToolCall(call.id, call.function.name, arguments)


def _tool(tool: openai.Tool) -> Tool:
    empty: dict[str, Any] = {"type": "object", "properties": {}}
    given = tool.function.parameters
    return Tool(tool.function.name, tool.function.description, empty if given is None else given)
