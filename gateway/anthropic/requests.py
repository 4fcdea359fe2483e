"""Requests as Anthropic's API has them, strictly: what is not listed here is refused by its name."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class CacheControl(Strict, frozen=True, kw_only=True):
    """Beginnings of prompts are found again without it: it changes nothing."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Strict, tag_field="type", tag="text", frozen=True, kw_only=True):
    text: str
    citations: None = None
    cache_control: CacheControl | None = None


class Base64Source(Strict, tag_field="type", tag="base64", frozen=True, kw_only=True):
    media_type: str
    data: str


class UrlSource(Strict, tag_field="type", tag="url", frozen=True, kw_only=True):
    url: str


class ImageBlock(Strict, tag_field="type", tag="image", frozen=True, kw_only=True):
    source: Base64Source | UrlSource
    cache_control: CacheControl | None = None


class ToolUseBlock(Strict, tag_field="type", tag="tool_use", frozen=True, kw_only=True):
    id: str
    name: Annotated[str, Meta(min_length=1)]
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None
    toolset_name: None = None


class ToolResultBlock(Strict, tag_field="type", tag="tool_result", frozen=True, kw_only=True):
    """`is_error` is for who reads it: a template has no place for it, and the content says what went wrong."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock] | None = None
    toolset_name: None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(Strict, tag_field="type", tag="thinking", frozen=True, kw_only=True):
    thinking: str
    signature: str = ""


class UserMessage(Strict, tag_field="role", tag="user", frozen=True, kw_only=True):
    content: str | list[TextBlock | ImageBlock | ToolResultBlock]


class AssistantMessage(Strict, tag_field="role", tag="assistant", frozen=True, kw_only=True):
    content: str | list[TextBlock | ThinkingBlock | ToolUseBlock]


class Tool(Strict, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Strict, frozen=True, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict, frozen=True, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class Metadata(Strict, frozen=True, kw_only=True):
    user_id: str | None = None


class Conversed(Strict, frozen=True, kw_only=True):
    """What is sampled and what is counted have in common."""

    model: str
    messages: Annotated[list[UserMessage | AssistantMessage], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: CacheControl | None = None


class CountRequest(Conversed, frozen=True, kw_only=True):
    pass


class MessageRequest(Conversed, frozen=True, kw_only=True):
    """`metadata` and `service_tier` change nothing."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


REFUSED = {
    "container": "is not served: Lorry runs no code",
    "mcp_servers": "is not served: Lorry calls no tools itself",
    "context_management": "is not served: conversations are rendered as they are",
    "output_config": "is not served: models write what they write",
    "output_format": "is not served: models write what they write",
}
"""Fields of Anthropic's that there are not, and why."""
