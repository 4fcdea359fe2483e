"""A turn in OpenAI's words, whole or as deltas. Pure, but for the ids of calls, which are drawn."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...wire.types import StopReason
from ..chat.events import Call, Content, Event, Reasoning


def new_call_id() -> str:
    return "call_" + secrets.token_hex(12)


@dataclass(slots=True)
class Turn:
    """One choice, as far as it has come."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def delta(self, event: Event) -> dict[str, Any]:
        match event:
            case Content(text):
                self.content += text
                return {"content": text}
            case Reasoning(text):
                self.reasoning += text
                return {"reasoning_content": text, "reasoning": text}
            case Call(name, arguments):
                function = {"name": name, "arguments": arguments}
                call = {"id": new_call_id(), "type": "function", "function": function}
                self.tool_calls.append(call)
                return {"tool_calls": [{"index": len(self.tool_calls) - 1} | call]}

    def message(self) -> dict[str, Any]:
        said = self.content if self.content or not self.tool_calls else None
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if self.reasoning:
            message |= {"reasoning_content": self.reasoning, "reasoning": self.reasoning}
        return message | ({"tool_calls": self.tool_calls} if self.tool_calls else {})

    def finish(self, reason: StopReason) -> str:
        return "tool_calls" if self.tool_calls and reason == "stop" else reason


def usage_of(prompt_tokens: int, cached: int, sequences: Sequence[int]) -> dict[str, Any]:
    """`sequences` are the lengths of what was sampled."""
    sampled = sum(sequences)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sampled,
        "total_tokens": prompt_tokens + sampled,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
