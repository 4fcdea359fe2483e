"""A conversation as the prompt that its model was trained on: its chat template, then its tokenizer, then images."""

from dataclasses import dataclass, replace
from typing import Any

from ...wire.errors import InvalidRequestError
from ...wire.model_input import Chunk, EncodedTextChunk, ImageChunk, ModelInput
from ..errors import NotSupportedError
from .conversation import Conversation
from .tokenizers import Tokenizer

_THINKING = ("enable_thinking", "thinking")
"""What Qwen's and DeepSeek's templates call it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """`thinks` says that the template has opened what the model thinks."""

    tokens: ModelInput
    thinks: bool

    @property
    def text_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.tokens.chunks if isinstance(chunk, EncodedTextChunk))


def check(tokenizer: Tokenizer, conversation: Conversation, variables_field: str) -> None:
    """Raises InvalidRequestError, or NotSupportedError for what the model's template has no place for."""
    if not tokenizer.has_template:
        problem = "the model has no chat template; completions take text as it is"
        raise NotSupportedError(problem, field="model")
    if conversation.tools and not (tokenizer.takes_tools and tokenizer.syntax.calls):
        lacks = "names no tools" if not tokenizer.takes_tools else "has its model write calls in an unknown way"
        raise NotSupportedError(f"tools are given, and the model's chat template {lacks}", field="tools")
    for name in conversation.variables:
        if name not in tokenizer.variables:
            known = ", ".join(sorted(tokenizer.variables)) or "none"
            raise InvalidRequestError.of(variables_field, name, f"one that the model's chat template asks for: {known}")


def with_thinking(tokenizer: Tokenizer, conversation: Conversation) -> Conversation:
    """As its template is told of it. Raises NotSupportedError where the model cannot be kept from thinking."""
    wanted = conversation.thinking
    if wanted is None:
        return conversation
    for name in _THINKING:
        if name in tokenizer.variables:
            return replace(conversation, variables=conversation.variables | {name: wanted})
    if not wanted and tokenizer.syntax.thinks:
        problem = "thinking is off, and the model's chat template has no way to say so"
        raise NotSupportedError(problem, field="thinking")
    return conversation


def render(tokenizer: Tokenizer, conversation: Conversation) -> Prompt:
    """Call it in a thread. Raises InvalidRequestError."""
    text = tokenizer.render(
        conversation.as_templates_take_it(),
        conversation.tools_as_templates_take_them(),
        conversation.variables,
        continues=conversation.continues,
    )
    tokens = with_images(tokenizer.encode(text, special=False), conversation.images, tokenizer.image)
    return Prompt(tokens, tokenizer.syntax.thinks_after(text))


def with_images(tokens: list[int], images: list[ImageChunk], placeholder: int | None) -> ModelInput:
    """Each image in the place that the template gave it. Raises InvalidRequestError where it gave none, or more."""
    places = [at for at, token in enumerate(tokens) if token == placeholder] if placeholder is not None else []
    if len(places) != len(images):
        where = f"the rendered conversation has {len(places)} places for images, and {len(images)} images"
        hint = "the model has no eyes" if placeholder is None else "no text may spell the place of an image"
        raise InvalidRequestError(f"{where}; {hint}", field="messages")
    chunks: list[Chunk] = []
    start = 0
    for at, image in zip(places, images, strict=True):
        chunks += [EncodedTextChunk(tokens[start:at]), image]
        start = at + 1
    chunks.append(EncodedTextChunk(tokens[start:]))
    return ModelInput([chunk for chunk in chunks if isinstance(chunk, ImageChunk) or chunk.tokens])


def plain_variables(given: dict[str, Any] | None, **named: Any) -> dict[str, Any]:
    """What is said of a template's variables, by whichever name."""
    return (given or {}) | {name: value for name, value in named.items() if value is not None}
