"""Requests as OpenAI's API has them, strictly: what is not listed here is refused by its name."""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

Top: TypeAlias = Annotated[int, Meta(ge=0, le=20)]
Samples: TypeAlias = Annotated[int, Meta(ge=1, le=128)]
Length: TypeAlias = Annotated[int, Meta(ge=1)]
Zero: TypeAlias = Annotated[float, Meta(ge=0, le=0)]
"""What is off, and may be said to be."""
Empty: TypeAlias = Annotated[dict[str, float], Meta(max_length=0)]
Token: TypeAlias = Annotated[int, Meta(ge=0, lt=2**31)]
"""More than any vocabulary has; what a model's own has, its actors know."""
Stop: TypeAlias = str | list[str] | None


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class StreamOptions(Strict, frozen=True, kw_only=True):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Sampled(Strict, frozen=True, kw_only=True):
    """What completions and chat have in common. `user` and what follows it changes nothing, and is taken for that."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Samples | None = 1
    stop: Stop = None
    stop_token_ids: list[Token] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Empty | None = None
    user: str | None = None


class CompletionRequest(Sampled, frozen=True, kw_only=True):
    """`max_tokens` 0 samples nothing: with `echo`, the prompt is scored."""

    prompt: str | list[str | Token | list[Token]]
    best_of: int | None = None
    echo: bool | None = False
    logprobs: Top | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = 16
    suffix: None = None


class Function(Strict, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1)]
    arguments: str


class ToolCall(Strict, frozen=True, kw_only=True):
    id: str
    function: Function
    type: Literal["function"] = "function"
    index: int | None = None


class TextPart(Strict, tag_field="type", tag="text", frozen=True, kw_only=True):
    text: str


class ImageUrl(Strict, frozen=True, kw_only=True):
    url: str
    detail: Literal["auto"] | None = None


class ImagePart(Strict, tag_field="type", tag="image_url", frozen=True, kw_only=True):
    image_url: ImageUrl


Texts: TypeAlias = str | list[TextPart]


class SystemMessage(Strict, tag_field="role", tag="system", frozen=True, kw_only=True):
    content: Texts
    name: str | None = None


class DeveloperMessage(Strict, tag_field="role", tag="developer", frozen=True, kw_only=True):
    content: Texts
    name: str | None = None


class UserMessage(Strict, tag_field="role", tag="user", frozen=True, kw_only=True):
    content: str | list[TextPart | ImagePart]
    name: str | None = None


class AssistantMessage(Strict, tag_field="role", tag="assistant", frozen=True, kw_only=True):
    """As it was answered, so that it can be sent back. Of `reasoning_content` and `reasoning` one is enough."""

    content: Texts | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None


class ToolMessage(Strict, tag_field="role", tag="tool", frozen=True, kw_only=True):
    content: Texts
    tool_call_id: str
    name: str | None = None


Message: TypeAlias = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class FunctionDefinition(Strict, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict, frozen=True, kw_only=True):
    function: FunctionDefinition
    type: Literal["function"] = "function"


class ResponseFormat(Strict, frozen=True, kw_only=True):
    type: str


class ChatRequest(Sampled, frozen=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Length | None = None
    max_completion_tokens: Length | None = None
    logprobs: bool | None = False
    top_logprobs: Top | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


REFUSED = {
    "functions": "was replaced by tools",
    "function_call": "was replaced by tool_choice",
    "audio": "is not served: models here read and write text",
    "prediction": "is not served: Lorry does not take predicted outputs",
    "web_search_options": "is not served: nothing is looked up",
    "verbosity": "is not served: no chat template knows it",
}
"""Fields of OpenAI's that there are not, and why."""
