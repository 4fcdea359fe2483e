"""Chat completions, whole or streamed."""

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from ...wire.streaming import Piece, whole
from ...wire.types import SampleResponse
from ..chat.endpoint import Call
from ..chat.events import Event
from ..chat.preparing import Prepared, Stops, params_of, prepare
from ..chat.sampling import Sample, accepted
from ..chat.speaking import Speech
from . import logprobs
from .answers import Turn, usage_of
from .errors import DONE, event
from .messages import conversation_of
from .requests import ChatRequest, Sampled


@dataclass(slots=True)
class _Choice:
    """`scores` are those of tokens whose text was not told yet."""

    speech: Speech
    turn: Turn = field(default_factory=Turn)
    tokens: int = 0
    scores: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def stops_of(request: Sampled) -> Stops:
    """Raises InvalidRequestError."""
    texts = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return Stops(texts, tuple(request.stop_token_ids or ())).checked()


async def chat(call: Call, request: ChatRequest) -> None:
    stops = stops_of(request)
    prepared = await prepare(call, request.model, conversation_of(request), "chat_template_kwargs")
    params = params_of(
        prepared.ends,
        stops,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
    )
    n = request.n or 1
    answer = _Answer(request, prepared, [_Choice(prepared.speech(stops)) for _ in range(n)])
    wanted = prepared.sample(n, params, request.top_logprobs or 0)
    async with accepted(prepared.chosen, wanted, streams=bool(request.stream)) as sample:
        await (answer.stream(call, sample) if request.stream else answer.whole(call, sample))


class _Answer:
    def __init__(self, request: ChatRequest, prepared: Prepared, choices: list[_Choice]) -> None:
        self._request, self._choices = request, choices
        self._vocabulary = prepared.tokenizer.vocabulary
        self._id, self._created = "chatcmpl-" + secrets.token_hex(12), int(time.time())

    async def whole(self, call: Call, sample: Sample) -> None:
        response = await sample.response()
        told = await call.desk.tokenizers.work(lambda: [self._choice(piece) for piece in whole(response)])
        await call.reply.json(self._envelope("chat.completion", told) | {"usage": self._usage(response)})

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice = self._choices[piece.sample]
        for each in self._heard(choice, piece):
            choice.turn.delta(each)
        scores = {"content": choice.scores} if self._request.logprobs else None
        return {
            "index": piece.sample,
            "message": choice.turn.message(),
            "logprobs": scores,
            "finish_reason": choice.turn.finish(piece.stop_reason or "stop"),
        }

    async def stream(self, call: Call, sample: Sample) -> None:
        """The first event goes out before anything is sampled."""
        await call.reply.open_stream()
        for i in range(len(self._choices)):
            await call.reply.event(self._chunk(i, {"role": "assistant", "content": ""}))
        async for piece in sample.pieces():
            for chunk in self._chunks(piece):
                await call.reply.event(chunk)
        options = self._request.stream_options
        if options and options.include_usage:
            usage = self._usage(await sample.response())
            await call.reply.event(event(self._envelope("chat.completion.chunk", []) | {"usage": usage}))
        await call.reply.event(DONE)

    def _chunks(self, piece: Piece) -> list[bytes]:
        choice = self._choices[piece.sample]
        chunks: list[bytes] = []
        for each in self._heard(choice, piece):
            chunks.append(self._chunk(piece.sample, choice.turn.delta(each), choice.scores))
            choice.scores = []
        if piece.stop_reason:
            finish = choice.turn.finish(piece.stop_reason)
            chunks.append(self._chunk(piece.sample, {}, choice.scores, finish))
            choice.scores = []
        return chunks

    def _heard(self, choice: _Choice, piece: Piece) -> list[Event]:
        choice.tokens += len(piece.tokens)
        if self._request.logprobs:
            choice.scores += logprobs.of_chat(self._vocabulary, piece.tokens, piece.logprobs, piece.topk_logprobs)
        return choice.speech.feed(piece.tokens) + (choice.speech.end() if piece.stop_reason else [])

    def _chunk(
        self, index: int, delta: dict[str, Any], scores: list[dict[str, Any]] | None = None, finish: str | None = None
    ) -> bytes:
        told = {"content": scores} if scores else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}
        return event(self._envelope("chat.completion.chunk", [choice]))

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        told = {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}
        return told | {"choices": choices}

    def _usage(self, response: SampleResponse) -> dict[str, Any]:
        lengths = [len(sequence.tokens) for sequence in response.sequences]
        return usage_of(response.prompt_tokens, response.prompt_cache_hit_tokens, lengths)
