"""How a model writes what it thinks and calls, told from its chat template. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

from .calls import ReadCalls, Schemas, object_call, separated_call, tagged_call
from .parsing import HARMONY_MARKS, Harmony, Objects, Parser, Plain, Tagged

_THINK = ("<think>", "</think>")
_DEEPSEEK, _DEEPSEEK_NAME = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"), "<｜tool▁sep｜>"
_DEEPSEEK_ROUND = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_KIMI, _KIMI_NAME = ("<|tool_call_begin|>", "<|tool_call_end|>"), "<|tool_call_argument_begin|>"
_KIMI_ROUND = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_LLAMA = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class Syntax:
    """`marks` are looked for in what is sampled, `tool_marks` where the request has tools; `silent` ones say nothing.
    `ends` end a turn beside the model's own tokens. A template that `takes_tools` and has no `calls` writes calls in a
    way that is not known."""

    name: str
    marks: tuple[str, ...] = ()
    tool_marks: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    think: tuple[str, str] | None = None
    calls: bool = False
    parser: Callable[[Schemas, bool], Parser] = lambda schemas, thinks: Plain()

    @property
    def thinks(self) -> bool:
        return self.think is not None or self.name == "harmony"

    def all_marks(self, has_tools: bool) -> tuple[str, ...]:
        return self.marks + (self.tool_marks if has_tools else ())

    def thinks_after(self, prompt: str) -> bool:
        """Whether the prompt ends in the middle of what the model thinks."""
        return self.think is not None and prompt.rstrip().endswith(self.think[0])


def syntax_of(template: str) -> Syntax:
    if "<|channel|>" in template:
        ends = ("<|return|>", "<|call|>")
        return Syntax("harmony", HARMONY_MARKS, ends=ends, calls=True, parser=lambda schemas, _: Harmony(schemas))
    think = _THINK if _THINK[1] in template else None
    if _DEEPSEEK[0] in template:
        read = separated_call(_DEEPSEEK_NAME)
        return _tagged("deepseek", think, _DEEPSEEK, read, (_DEEPSEEK_NAME,), _DEEPSEEK_ROUND)
    if _KIMI[0] in template:
        return _tagged("kimi", think, _KIMI, separated_call(_KIMI_NAME), (_KIMI_NAME,), _KIMI_ROUND)
    if "<tool_call>" in template and "<arg_key>" not in template:
        name, read = ("qwen-xml", tagged_call) if "<function=" in template else ("hermes", object_call)
        return _tagged(name, think, ("<tool_call>", "</tool_call>"), read)
    if "<|start_header_id|>" in template and '"parameters"' in template:
        return Syntax("llama", tool_marks=(_LLAMA,), calls=True, parser=lambda schemas, _: _objects(schemas))
    return Syntax("plain", think or (), think=think, parser=lambda schemas, thinks: _thinking(think, schemas, thinks))


def _tagged(
    name: str,
    think: tuple[str, str] | None,
    call: tuple[str, str],
    read: ReadCalls,
    inner: tuple[str, ...] = (),
    silent: tuple[str, ...] = (),
) -> Syntax:
    def parser(schemas: Schemas, thinks: bool) -> Parser:
        return Tagged(think, call if schemas else None, read, schemas, thinks=thinks)

    return Syntax(name, think or (), (*call, *inner, *silent), silent, think=think, calls=True, parser=parser)


def _objects(schemas: Schemas) -> Parser:
    return Objects(_LLAMA, schemas) if schemas else Plain()


def _thinking(think: tuple[str, str] | None, schemas: Schemas, thinks: bool) -> Parser:
    return Tagged(think, None, object_call, schemas, thinks=thinks) if think else Plain()
