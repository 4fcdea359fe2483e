"""Messages, whole or streamed, and how many tokens they are."""

import secrets
from typing import Any

from ...wire.streaming import Piece, whole
from ...wire.types import StopReason
from ..chat.endpoint import Call
from ..chat.events import Call as ToolCall
from ..chat.events import Event, joined
from ..chat.preparing import Prepared, Stops, params_of, prepare
from ..chat.sampling import Sample, accepted
from ..errors import NotSupportedError
from .answers import Blocks, blocks_of, ended_by, usage, usage_of
from .conversing import conversation_of
from .errors import event
from .requests import CountRequest, MessageRequest


async def messages(call: Call, request: MessageRequest) -> None:
    stops = Stops(tuple(request.stop_sequences or ()), field="stop_sequences").checked()
    prepared = await prepare(call, request.model, conversation_of(request), "thinking")
    params = params_of(
        prepared.ends,
        stops,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
    )
    answer = _Answer(request, prepared, stops)
    wanted = prepared.sample(1, params)
    async with accepted(prepared.chosen, wanted, streams=bool(request.stream)) as sample:
        await (answer.stream(call, sample) if request.stream else answer.whole(call, sample))


async def count_tokens(call: Call, request: CountRequest) -> None:
    prepared = await prepare(call, request.model, conversation_of(request), "thinking")
    length = prepared.prompt.tokens.known_length
    if length is None:
        problem = "there are images in the messages, whose tokens are counted only where they are looked at"
        raise NotSupportedError(problem, field="messages")
    await call.reply.json({"input_tokens": length})


class _Answer:
    def __init__(self, request: MessageRequest, prepared: Prepared, stops: Stops) -> None:
        self._request, self._prompt = request, prepared.prompt
        self._speech = prepared.speech(stops)
        self._id = "msg_" + secrets.token_hex(12)
        self._has_calls = False

    async def whole(self, call: Call, sample: Sample) -> None:
        response = await sample.response()
        (piece,) = whole(response)
        told = await call.desk.tokenizers.work(lambda: blocks_of(joined(self._heard(piece))))
        ended = self._ended(piece.stop_reason or "stop")
        await call.reply.json(self._message(told) | ended | {"usage": usage_of(response)})

    async def stream(self, call: Call, sample: Sample) -> None:
        """The first event goes out before anything is sampled."""
        await call.reply.open_stream()
        begun = self._message([]) | {"stop_reason": None, "stop_sequence": None}
        read = usage(self._prompt.text_tokens, 0, 0)
        await call.reply.event(event({"type": "message_start", "message": begun | {"usage": read}}))
        blocks, reason = Blocks(), "stop"
        async for piece in sample.pieces():
            for each in self._heard(piece):
                for told in blocks.say(each):
                    await call.reply.event(told)
            reason = piece.stop_reason or reason
        for told in blocks.close():
            await call.reply.event(told)
        last = {"type": "message_delta", "delta": self._ended(reason), "usage": usage_of(await sample.response())}
        await call.reply.event(event(last))
        await call.reply.event(event({"type": "message_stop"}))

    def _heard(self, piece: Piece) -> list[Event]:
        events = self._speech.feed(piece.tokens) + (self._speech.end() if piece.stop_reason else [])
        self._has_calls |= any(isinstance(each, ToolCall) for each in events)
        return events

    def _ended(self, reason: StopReason) -> dict[str, Any]:
        stopped = self._speech.stopped_by() if reason == "stop" else None
        return ended_by(reason, stopped, self._has_calls)

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        told = {"id": self._id, "type": "message", "role": "assistant", "model": self._request.model}
        return told | {"content": content}
