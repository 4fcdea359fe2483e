"""A model's tokenizer and chat template in the gateway: loaded once each, in a thread, and used in threads."""

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import structlog
from anyio import CapacityLimiter, to_thread
from jinja2 import Environment, TemplateError, meta, nodes

from ...client.tokenizers import load_tokenizer
from ...wire.errors import InvalidRequestError
from ..errors import TokenizerMissingError
from .syntaxes import Syntax, syntax_of
from .vocabulary import Vocabulary, is_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

log = structlog.get_logger("lorry.gateway")

_AT_THE_SAME_TIME = 4
"""Prompts that are rendered or made tokens of; the others wait."""
_OURS = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
)
_OF_JINJA = frozenset(("raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner"))
_IMAGE = "<|image_pad|>"
_ARGUMENTS_AS_TEXT = re.compile(r"\+\s*\w+\['function'\]\['arguments'\]\s*\+")
"""In a template that expects a call's arguments as they were written, as DeepSeek's does."""
_PROBE = "\x02probe\x02"
_OF_TEMPLATES = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template may raise over a conversation that is not to its taste."""


class Tokenizer:
    """Made in a thread by `Tokenizers`; every method of it is to be called in one, but for what is plain data.

    `variables` are the names that its chat template asks for beside the conversation's. `turn_ends` are the tokens
    that it writes after what an assistant says.
    """

    def __init__(self, loaded: "PreTrainedTokenizerBase") -> None:
        self._loaded: Any = loaded
        self._fast: Any = getattr(loaded, "backend_tokenizer", None)
        self.vocabulary = self._vocabulary()
        template = self._template(has_tools=False)
        self.has_template = template is not None
        self.takes_tools = "tools" in _names_in(self._template(has_tools=True) or "")
        self.variables = _names_in(template or "") - _OURS - set(loaded.special_tokens_map)
        self.syntax: Syntax = syntax_of(self._template(has_tools=True) or "")
        self._reads_arguments = not _ARGUMENTS_AS_TEXT.search(template or "")
        self.image: int | None = self.vocabulary.added.get(_IMAGE)
        self.turn_ends: tuple[int, ...] = self._turn_ends()

    def encode(self, text: str, *, special: bool) -> list[int]:
        """`special` adds the tokens that the model's texts begin with."""
        if self._fast is not None:
            return list(self._fast.encode(text, add_special_tokens=special).ids)
        return list(self._loaded.encode(text, add_special_tokens=special))

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        *,
        continues: bool = False,
    ) -> str:
        """As transformers renders it. Raises InvalidRequestError with what the template says."""
        try:
            return self._loaded.apply_chat_template(
                messages if self._reads_arguments else [_with_arguments_as_text(message) for message in messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                **variables,
            )
        except _OF_TEMPLATES as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            problem = f"the model's chat template does not take these messages ({reason})"
            raise InvalidRequestError(problem, field="messages") from None

    def _template(self, *, has_tools: bool) -> str | None:
        try:
            return self._loaded.get_chat_template(tools=[{}] if has_tools else None)
        except ValueError:
            return None

    def _turn_ends(self) -> tuple[int, ...]:
        ends = [self.vocabulary.added[name] for name in self.syntax.ends if name in self.vocabulary.added]
        if ends or not self.has_template:
            return tuple(ends)
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}]
        try:
            rendered: str = self._loaded.apply_chat_template(turns, tokenize=False)
        except _OF_TEMPLATES:
            return ()
        after = self.encode(rendered.rpartition(_PROBE)[2].lstrip(), special=False)[:1]
        return tuple(token for token in after if token in self.vocabulary.special)

    def _vocabulary(self) -> Vocabulary:
        loaded, fast = self._loaded, self._fast
        added = {str(token): int(number) for number, token in loaded.added_tokens_decoder.items()}
        special = frozenset(int(n) for n, token in loaded.added_tokens_decoder.items() if token.special)

        def decode(tokens: list[int]) -> str:
            if fast is not None:
                return fast.decode(tokens, skip_special_tokens=False)
            return loaded.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        def piece(token: int) -> str | None:
            return fast.id_to_token(token) if fast is not None else loaded.convert_ids_to_tokens(token)

        decoder = getattr(fast, "decoder", None)
        state = decoder.__getstate__().decode() if decoder is not None else ""
        return Vocabulary(decode, piece, added, special, is_byte_level(state))


def _with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if not (calls := message.get("tool_calls")):
        return message
    written = [call | {"function": call["function"] | {"arguments": _written(call["function"])}} for call in calls]
    return message | {"tool_calls": written}


def _written(function: dict[str, Any]) -> str:
    return json.dumps(function["arguments"], ensure_ascii=False)


class Tokenizers:
    """By the id that a model's actors told. One that cannot be loaded is tried again when it is next asked for."""

    def __init__(self, load: Callable[[str], Any] = load_tokenizer) -> None:
        self._load = load
        self._loaded: dict[str, Tokenizer] = {}
        self._loading: dict[str, anyio.Lock] = {}
        self._threads = CapacityLimiter(_AT_THE_SAME_TIME)

    async def get(self, tokenizer_id: str) -> Tokenizer:
        """Raises TokenizerMissingError."""
        if found := self._loaded.get(tokenizer_id):
            return found
        async with self._loading.setdefault(tokenizer_id, anyio.Lock()):
            if found := self._loaded.get(tokenizer_id):
                return found
            try:
                loaded = await self._load(tokenizer_id)
                made = self._loaded[tokenizer_id] = await self.work(lambda: Tokenizer(loaded))
            except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
                log.warning("no tokenizer", tokenizer=tokenizer_id, error=repr(error))
                raise TokenizerMissingError("the gateway cannot load this model's tokenizer", field="model") from None
            return made

    async def work(self, call: Callable[[], T]) -> T:
        """In a thread, when one of a few is free."""
        return await to_thread.run_sync(call, limiter=self._threads)


def _names_in(template: str) -> frozenset[str]:
    """The variables that a template asks for; not those that it sets itself, unless it looks whether they are there."""
    if not template:
        return frozenset()
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(plain)
        names = meta.find_undeclared_variables(tree)
    except TemplateError:
        return frozenset()
    set_there = {name.name for name in tree.find_all(nodes.Name) if name.ctx in ("store", "param")}
    looked_for = set(re.findall(r"\b(\w+) is (?:not )?defined", plain)) | set(
        re.findall(r"\bnot (\w+) is defined", plain)
    )
    return frozenset(names - (set_there - looked_for - _OURS) - _OF_JINJA)
