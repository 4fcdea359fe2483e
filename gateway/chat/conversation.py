"""A conversation as chat templates take it, whichever API it came by, and what is wrong with one. Pure."""

import base64
import binascii
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import msgspec

from ...wire.errors import InvalidRequestError
from ...wire.model_input import ImageChunk, ImageFormat

_FORMATS: dict[str, ImageFormat] = {"image/png": "png", "image/jpeg": "jpeg", "image/jpg": "jpeg"}


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    image: ImageChunk


Part: TypeAlias = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """`reasoning` is what an assistant thought before it said this; `answers` the id of the call that a tool answers,
    and `name` that of the tool."""

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[Part, ...] = ()
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    answers: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """`parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Conversation:
    """`variables` go to the template by name. One that `continues` ends with a message that the model goes on with.
    `thinking` None leaves it to the template whether it thinks."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    variables: dict[str, Any] = field(default_factory=dict[str, Any])
    continues: bool = False
    thinking: bool | None = None

    @property
    def images(self) -> list[ImageChunk]:
        parts = (part for message in self.messages for part in message.parts)
        return [part.image for part in parts if isinstance(part, ImagePart)]

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        return {tool.name: tool.parameters for tool in self.tools}

    def as_templates_take_it(self) -> list[dict[str, Any]]:
        """Content is one string, but where an image is among it."""
        return [_plain(message) for message in self.messages]

    def tools_as_templates_take_them(self) -> list[dict[str, Any]] | None:
        return [_plain_tool(tool) for tool in self.tools] or None


def _plain(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": _content(message.parts)}
    if message.reasoning is not None:
        plain["reasoning_content"] = plain["thinking"] = message.reasoning
    if message.calls:
        plain["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    if message.answers is not None:
        plain["tool_call_id"] = message.answers
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _content(parts: tuple[Part, ...]) -> str | list[dict[str, Any]]:
    if all(isinstance(part, TextPart) for part in parts):
        return "".join(part.text for part in parts if isinstance(part, TextPart))
    return [{"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in parts]


def _plain_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function | {"parameters": tool.parameters}}


def image_of(where: str, media_type: str, data: str) -> ImagePart:
    """Raises InvalidRequestError for what is no image that models with eyes take."""
    if media_type not in _FORMATS:
        raise InvalidRequestError.of(where, media_type, "image/png or image/jpeg")
    try:
        return ImagePart(ImageChunk(base64.b64decode(data, validate=True), _FORMATS[media_type]))
    except (binascii.Error, ValueError):
        raise InvalidRequestError.of(where, data[:40], "an image's bytes in base64") from None


def arguments_of(where: str, text: str) -> dict[str, Any]:
    """A call's arguments. Raises InvalidRequestError."""
    try:
        value = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequestError.of(where, text, "a JSON object")
    return cast("dict[str, Any]", value)


def with_names(messages: list[Message]) -> list[Message]:
    """Some templates want to know which tool it is that answers: the call says it."""
    names = {call.id: call.name for message in messages for call in message.calls}
    return [
        Message(m.role, m.parts, m.reasoning, m.calls, m.answers, m.name or names.get(m.answers))
        if m.role == "tool" and m.answers
        else m
        for m in messages
    ]
