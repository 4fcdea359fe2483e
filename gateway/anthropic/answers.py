"""A turn in Anthropic's words: blocks of content, whole or as events. Pure, but that ids of calls are drawn."""

import json
import secrets
from typing import Any

from ...wire.types import SampleResponse, StopReason
from ..chat.events import Call, Content, Event, Reasoning
from .errors import event


def blocks_of(events: list[Event]) -> list[dict[str, Any]]:
    return [_whole(each) for each in events]


def _whole(each: Event) -> dict[str, Any]:
    match each:
        case Content(text):
            return {"type": "text", "text": text}
        case Reasoning(text):
            return {"type": "thinking", "thinking": text, "signature": ""}
        case Call(name, arguments):
            return _tool_use(name) | {"input": json.loads(arguments)}


def _tool_use(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": "toolu_" + secrets.token_hex(12), "name": name, "input": {}}


class Blocks:
    """Events to events: a block is opened, grows and is closed before the next one is."""

    def __init__(self) -> None:
        self._index = -1
        self._open: type[Event] | None = None

    def say(self, each: Event) -> list[bytes]:
        match each:
            case Content(text):
                return [*self._opened(Content, {"type": "text", "text": ""}), self._delta("text", text=text)]
            case Reasoning(text):
                empty = {"type": "thinking", "thinking": "", "signature": ""}
                return [*self._opened(Reasoning, empty), self._delta("thinking", thinking=text)]
            case Call(name, arguments):
                opened = self._opened(Call, _tool_use(name))
                return [*opened, self._delta("input_json", partial_json=arguments), *self.close()]

    def close(self) -> list[bytes]:
        if self._open is None:
            return []
        last = [self._delta("signature", signature="")] if self._open is Reasoning else []
        self._open = None
        return [*last, event({"type": "content_block_stop", "index": self._index})]

    def _opened(self, kind: type[Event], block: dict[str, Any]) -> list[bytes]:
        if self._open is kind:
            return []
        closed = self.close()
        self._index, self._open = self._index + 1, kind
        return [*closed, event({"type": "content_block_start", "index": self._index, "content_block": block})]

    def _delta(self, kind: str, **fields: str) -> bytes:
        delta = {"type": f"{kind}_delta"} | fields
        return event({"type": "content_block_delta", "index": self._index, "delta": delta})


def ended_by(reason: StopReason, stopped: str | None, has_calls: bool) -> dict[str, Any]:
    """`stopped` is the stop sequence that it ended with."""
    if reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if stopped is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stopped}
    return {"stop_reason": "tool_use" if has_calls else "end_turn", "stop_sequence": None}


def usage_of(response: SampleResponse) -> dict[str, int]:
    """What was read from the cache does not count as input here."""
    cached = response.prompt_cache_hit_tokens
    return usage(response.prompt_tokens - cached, cached, sum(len(s.tokens) for s in response.sequences))


def usage(read: int, cached: int, sampled: int) -> dict[str, int]:
    told = {"input_tokens": read, "output_tokens": sampled}
    return told | {"cache_read_input_tokens": cached, "cache_creation_input_tokens": 0}
