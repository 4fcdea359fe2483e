"""Completions: text goes on, and prompts are scored."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import anyio

from ...wire.commands import ComputeLogprobsInput, SampleInput
from ...wire.errors import InvalidRequestError
from ...wire.model_input import ModelInput
from ...wire.streaming import Piece, whole
from ...wire.types import SampleResponse
from ..chat.endpoint import Call
from ..chat.events import Content
from ..chat.preparing import Stops, choose, params_of
from ..chat.sampling import Chosen, accepted
from ..chat.speaking import Speech
from ..chat.syntaxes import Syntax
from ..chat.tokenizers import Tokenizer
from ..chat.vocabulary import Vocabulary
from ..errors import NotSupportedError
from . import logprobs
from .answers import usage_of
from .chat import stops_of
from .errors import DONE, event
from .requests import CompletionRequest

_PLAIN = Syntax("plain")
_PROMPTS_AT_MOST = 2048
_AT_THE_SAME_TIME = 64
"""Of one request's prompts."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    """`text` is what was sent, where it was text."""

    tokens: list[int]
    text: str | None


@dataclass(slots=True)
class _Choice:
    """`shown` is how much text there is by now, with what is echoed of the prompt."""

    index: int
    speech: Speech
    text: str = ""
    shown: int = 0
    tokens: list[int] = field(default_factory=list[int])


async def complete(call: Call, request: CompletionRequest) -> None:
    stops = stops_of(request)
    _check(request)
    texts = _prompts(request.prompt)
    chosen, tokenizer, ends = await choose(call, request.model)
    prompts = await call.desk.tokenizers.work(lambda: [_encoded(tokenizer, prompt) for prompt in texts])
    work = _Work(request, chosen, tokenizer, stops, ends)
    await (work.stream(call, prompts) if request.stream else work.whole(call, prompts))


def _check(request: CompletionRequest) -> None:
    """What cannot be promised is refused."""
    n = request.n or 1
    if request.best_of not in (None, n):
        raise NotSupportedError(f"best_of is {request.best_of}, expected n, which is {n}", field="best_of")
    if request.stream and request.echo and request.logprobs is not None:
        raise NotSupportedError("echo with logprobs is not streamed, expected stream: false", field="stream")
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequestError.of("max_tokens", 0, "1 or more, or echo: true to score the prompt")
    if request.max_tokens == 0 and n > 1:
        raise InvalidRequestError.of("n", n, "1 where nothing is sampled")


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Raises InvalidRequestError."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(isinstance(each, int) for each in prompt):
        return [cast("list[int]", prompt)]
    if not 1 <= len(prompt) <= _PROMPTS_AT_MOST:
        raise InvalidRequestError.of("len(prompt)", len(prompt), f"1 to {_PROMPTS_AT_MOST:,} prompts")
    if any(isinstance(each, int) for each in prompt):
        raise InvalidRequestError.of("prompt", prompt, "texts, or lists of token ids, or one such")
    return cast("list[str | list[int]]", prompt)


def _encoded(tokenizer: Tokenizer, prompt: str | list[int]) -> _Prompt:
    if isinstance(prompt, str):
        return _Prompt(tokenizer.encode(prompt, special=True), prompt)
    return _Prompt(prompt, None)


class _Work:
    """One request."""

    def __init__(
        self, request: CompletionRequest, chosen: Chosen, tokenizer: Tokenizer, stops: Stops, ends: tuple[int, ...]
    ) -> None:
        self._request, self._chosen, self._tokenizer, self._stops, self._ends = request, chosen, tokenizer, stops, ends
        self._vocabulary: Vocabulary = tokenizer.vocabulary
        self._n = request.n or 1
        self._id, self._created = "cmpl-" + secrets.token_hex(12), int(time.time())
        self._responses: dict[int, SampleResponse] = {}
        self._places = anyio.Semaphore(_AT_THE_SAME_TIME)

    async def whole(self, call: Call, prompts: list[_Prompt]) -> None:
        async def one(number: int, prompt: _Prompt) -> None:
            async with self._places, accepted(self._chosen, self._wanted(prompt)) as sample:
                self._responses[number] = await sample.response()

        await _all(one, prompts)
        choices: list[dict[str, Any]] = []
        for number, prompt in enumerate(prompts):
            choices += await call.desk.tokenizers.work(lambda n=number, p=prompt: self._told(n, p))
        await call.reply.json(self._envelope(choices) | {"usage": self._usage()})

    async def stream(self, call: Call, prompts: list[_Prompt]) -> None:
        async def one(number: int, prompt: _Prompt) -> None:
            choices = [self._choice(number, sample) for sample in range(self._n)]
            async with self._places, accepted(self._chosen, self._wanted(prompt), streams=True) as sample:
                await begun.open()
                for choice in choices if self._request.echo else ():
                    await call.reply.event(self._chunk(choice, self._echoed(prompt)))
                async for piece in sample.pieces():
                    if self._request.max_tokens != 0:
                        await self._say(call, choices[piece.sample], piece)
                self._responses[number] = await sample.response()
                if self._request.max_tokens == 0:
                    await call.reply.event(self._chunk(choices[0], "", None, "length"))

        begun = _Opening(call)
        await _all(one, prompts)
        options = self._request.stream_options
        if options and options.include_usage:
            await call.reply.event(event(self._envelope([]) | {"usage": self._usage()}))
        await call.reply.event(DONE)

    async def _say(self, call: Call, choice: _Choice, piece: Piece) -> None:
        text = _heard(choice.speech, piece)
        scores = None
        if self._request.logprobs is not None:
            scores = self._scores(piece, choice.shown)
        choice.shown += len(text)
        if text or scores or piece.stop_reason:
            await call.reply.event(self._chunk(choice, text, scores, piece.stop_reason))

    def _wanted(self, prompt: _Prompt) -> SampleInput | ComputeLogprobsInput:
        request = self._request
        tokens, top, scored = ModelInput.from_ints(prompt.tokens), request.logprobs or 0, request.logprobs is not None
        if request.max_tokens == 0 and not top:
            return ComputeLogprobsInput(tokens)
        params = params_of(
            self._ends,
            self._stops,
            max_tokens=None if request.max_tokens is None else max(1, request.max_tokens),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
        )
        echoes = bool(request.echo) and scored
        return SampleInput(tokens, self._n, params, echoes, top if echoes else 0, top)

    def _choice(self, number: int, sample: int) -> _Choice:
        speech = Speech(self._vocabulary, _PLAIN, {}, self._stops.texts, thinks=False)
        return _Choice(number * self._n + sample, speech)

    def _told(self, number: int, prompt: _Prompt) -> list[dict[str, Any]]:
        """A prompt's choices, whole."""
        response, request = self._responses[number], self._request
        pieces = list(whole(response)) if request.max_tokens != 0 else [Piece(0, 0, [], [], None, "length")]
        echoed = self._echoed(prompt) if request.echo else ""
        return [
            {
                "index": number * self._n + piece.sample,
                "text": echoed + _heard(self._choice(number, piece.sample).speech, piece),
                "logprobs": self._all_scores(prompt, response, piece) if request.logprobs is not None else None,
                "finish_reason": piece.stop_reason,
            }
            for piece in pieces
        ]

    def _echoed(self, prompt: _Prompt) -> str:
        """As its tokens spell it where their places in it are told."""
        if prompt.text is not None and self._request.logprobs is None:
            return prompt.text
        visible = [token for token in prompt.tokens if token not in self._vocabulary.special]
        return self._vocabulary.decode(visible)

    def _scores(self, piece: Piece, begins_at: int) -> dict[str, Any]:
        tops = self._tops(piece.topk_logprobs, len(piece.tokens))
        return logprobs.of_completion(self._vocabulary, piece.tokens, piece.logprobs, tops, begins_at)

    def _all_scores(self, prompt: _Prompt, response: SampleResponse, piece: Piece) -> dict[str, Any]:
        if not self._request.echo:
            return self._scores(piece, 0)
        before: Sequence[float | None] = response.prompt_logprobs or [None] * len(prompt.tokens)
        tops = None
        if self._request.logprobs:
            mine = self._tops(piece.topk_logprobs, len(piece.tokens)) or []
            tops = [*(response.topk_prompt_logprobs or [None] * len(prompt.tokens)), *mine]
        return logprobs.of_completion(
            self._vocabulary, [*prompt.tokens, *piece.tokens], [*before, *piece.logprobs], tops
        )

    def _tops(self, tops: Any, count: int) -> Any:
        return (tops or [None] * count) if self._request.logprobs else None

    def _chunk(self, choice: _Choice, text: str, scores: Any = None, finish: str | None = None) -> bytes:
        told = {"index": choice.index, "text": text, "logprobs": scores, "finish_reason": finish}
        return event(self._envelope([told]))

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        told = {"id": self._id, "object": "text_completion", "created": self._created, "model": self._request.model}
        return told | {"choices": choices}

    def _usage(self) -> dict[str, Any]:
        responses = self._responses.values()
        samples = () if self._request.max_tokens == 0 else responses
        lengths = [len(sequence.tokens) for response in samples for sequence in response.sequences]
        prompts, cached = (r.prompt_tokens for r in responses), (r.prompt_cache_hit_tokens for r in responses)
        return usage_of(sum(prompts), sum(cached), lengths)


class _Opening:
    """The stream begins when the first of its prompts was accepted: until then an error is an answer of its own."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def open(self) -> None:
        if not self._call.reply.is_stream:
            await self._call.reply.open_stream()


def _heard(speech: Speech, piece: Piece) -> str:
    events = speech.feed(piece.tokens) + (speech.end() if piece.stop_reason else [])
    return "".join(each.text for each in events if isinstance(each, Content))


async def _all(one: Any, prompts: list[_Prompt]) -> None:
    """All of them, or the first error, of whichever; the others are cancelled then."""
    failures: list[Exception] = []
    async with anyio.create_task_group() as tasks:

        async def guarded(number: int, prompt: _Prompt) -> None:
            try:
                await one(number, prompt)
            except Exception as error:  # it leaves as what it is, and in no group
                failures.append(error)
                tasks.cancel_scope.cancel()

        for number, prompt in enumerate(prompts):
            tasks.start_soon(guarded, number, prompt)
    if failures:
        raise failures[0]
