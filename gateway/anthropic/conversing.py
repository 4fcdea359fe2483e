"""Anthropic's messages and tools as a conversation. Pure."""

from ...wire.errors import InvalidRequestError
from ..chat.conversation import Conversation, Message, Part, TextPart, Tool, ToolCall, image_of, with_names
from ..errors import NotSupportedError
from . import requests as anthropic


def conversation_of(request: anthropic.Conversed) -> Conversation:
    """Raises InvalidRequestError and NotSupportedError naming the field."""
    check(request)
    messages: list[Message] = []
    if request.system is not None:
        messages.append(Message("system", _texts(request.system)))
    for i, message in enumerate(request.messages):
        messages += _messages(f"messages[{i}].content", message)
    takes_tools = request.tool_choice is None or request.tool_choice.type != "none"
    tools = tuple(Tool(t.name, t.description, t.input_schema) for t in request.tools or ()) if takes_tools else ()
    thinking = None if request.thinking is None else request.thinking.type != "disabled"
    return Conversation(tuple(with_names(messages)), tools, continues=_continues(request), thinking=thinking)


def check(request: anthropic.Conversed) -> None:
    """What cannot be promised is refused."""
    if (choice := request.tool_choice) is not None:
        if choice.type not in ("auto", "none"):
            raise NotSupportedError(f"tool_choice.type is {choice.type!r}, expected auto or none", field="tool_choice")
        if choice.disable_parallel_tool_use and request.tools:
            problem = "tool_choice.disable_parallel_tool_use is true, expected false"
            raise NotSupportedError(problem, field="tool_choice")
    if (thinking := request.thinking) is not None and thinking.type == "enabled":
        problem = "thinking.type is 'enabled', expected adaptive or disabled: a budget cannot be held"
        raise NotSupportedError(problem, field="thinking")
    if request.thinking is not None and request.thinking.budget_tokens is not None:
        raise NotSupportedError("thinking.budget_tokens cannot be held", field="thinking")


def _continues(request: anthropic.Conversed) -> bool:
    """Raises InvalidRequestError where there is nothing to go on with."""
    last = request.messages[-1]
    if isinstance(last, anthropic.UserMessage):
        return False
    blocks = [last.content] if isinstance(last.content, str) else last.content
    if not blocks or isinstance(blocks[-1], anthropic.ToolUseBlock | anthropic.ThinkingBlock):
        where = f"messages[{len(request.messages) - 1}].content"
        raise InvalidRequestError(f"{where} ends with no text that could be continued", field=where)
    return True


def _messages(where: str, message: anthropic.UserMessage | anthropic.AssistantMessage) -> list[Message]:
    if isinstance(message, anthropic.AssistantMessage):
        return [_said(message)]
    if isinstance(message.content, str):
        return [Message("user", (TextPart(message.content),))]
    found: list[Message] = []
    parts: list[Part] = []
    for i, block in enumerate(message.content):
        if isinstance(block, anthropic.ToolResultBlock):
            if parts:
                found.append(Message("user", tuple(parts)))
                parts = []
            found.append(Message("tool", _result(f"{where}[{i}].content", block), answers=block.tool_use_id))
        else:
            parts.append(_part(f"{where}[{i}]", block))
    return [*found, Message("user", tuple(parts))] if parts or not found else found


def _said(message: anthropic.AssistantMessage) -> Message:
    if isinstance(message.content, str):
        return Message("assistant", (TextPart(message.content),))
    blocks = message.content
    texts = tuple(TextPart(block.text) for block in blocks if isinstance(block, anthropic.TextBlock))
    thought = [block.thinking for block in blocks if isinstance(block, anthropic.ThinkingBlock)]
    used = [block for block in blocks if isinstance(block, anthropic.ToolUseBlock)]
    calls = tuple(ToolCall(block.id, block.name, block.input) for block in used)
    return Message("assistant", texts, "\n".join(thought) if thought else None, calls)


def _result(where: str, block: anthropic.ToolResultBlock) -> tuple[Part, ...]:
    if block.content is None or isinstance(block.content, str):
        return (TextPart(block.content or ""),)
    return tuple(_part(f"{where}[{i}]", part) for i, part in enumerate(block.content))


def _texts(content: str | list[anthropic.TextBlock]) -> tuple[Part, ...]:
    return (TextPart(content),) if isinstance(content, str) else tuple(TextPart(block.text) for block in content)


def _part(where: str, block: anthropic.TextBlock | anthropic.ImageBlock) -> Part:
    if isinstance(block, anthropic.TextBlock):
        return TextPart(block.text)
    if isinstance(block.source, anthropic.UrlSource):
        raise InvalidRequestError.of(f"{where}.source.type", "url", "base64: no address is fetched")
    return image_of(f"{where}.source", block.source.media_type, block.source.data)
