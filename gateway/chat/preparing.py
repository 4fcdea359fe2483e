"""What every request for a turn of a conversation takes before it is sampled: its model, its tokenizer, its prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...wire.commands import SampleInput
from ...wire.errors import InvalidRequestError
from ...wire.types import SamplingParams
from .conversation import Conversation
from .endpoint import Call
from .models import meant_by
from .rendering import Prompt, check, render, with_thinking
from .sampling import Chosen
from .speaking import Speech
from .tokenizers import Tokenizer

_SEEDS = 2**63 - 1
_STOPS_AT_MOST = 16
_STOP_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class Stops:
    """`tokens` end a turn beside the model's own. `field` is what the request calls the texts."""

    texts: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    field: str = "stop"

    def checked(self) -> "Stops":
        """Raises InvalidRequestError."""
        if len(self.texts) > _STOPS_AT_MOST:
            raise InvalidRequestError.of(f"len({self.field})", len(self.texts), f"at most {_STOPS_AT_MOST}")
        for text in self.texts:
            if not 0 < len(text) <= _STOP_CHARACTERS:
                wanted = f"texts of 1 to {_STOP_CHARACTERS:,} characters"
                raise InvalidRequestError.of(self.field, text, wanted)
        return self


@dataclass(frozen=True, slots=True)
class Prepared:
    """`ends` are the tokens that end a turn."""

    chosen: Chosen
    tokenizer: Tokenizer
    prompt: Prompt
    schemas: Mapping[str, Mapping[str, Any]]
    ends: tuple[int, ...]

    def speech(self, stops: Stops) -> Speech:
        """Of one of the sequences."""
        syntax, vocabulary = self.tokenizer.syntax, self.tokenizer.vocabulary
        return Speech(vocabulary, syntax, self.schemas, stops.texts, thinks=self.prompt.thinks)

    def sample(self, n: int, params: SamplingParams, top: int = 0) -> SampleInput:
        return SampleInput(self.prompt.tokens, n, params, topk_sample_logprobs=top)


async def choose(call: Call, model: str) -> tuple[Chosen, Tokenizer, tuple[int, ...]]:
    """The sampler, its tokenizer, and the tokens that end a sequence of the model.

    Raises NotFoundError, LoadingError, TokenizerMissingError.
    """
    chosen = Chosen(call.desk, call.broker, await meant_by(call.broker, model), call.patience_s)
    info = await chosen.info()
    return chosen, await call.desk.tokenizers.get(info.tokenizer_id), tuple(info.end_tokens)


async def prepare(call: Call, model: str, conversation: Conversation, variables_field: str) -> Prepared:
    """Raises what `choose` does, InvalidRequestError, NotSupportedError."""
    chosen, tokenizer, ends = await choose(call, model)
    check(tokenizer, conversation, variables_field)
    conversation = with_thinking(tokenizer, conversation)
    prompt = await call.desk.tokenizers.work(lambda: render(tokenizer, conversation))
    return Prepared(chosen, tokenizer, prompt, conversation.schemas, (*ends, *tokenizer.turn_ends))


def params_of(
    ends: Sequence[int],
    stops: Stops,
    *,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None = None,
) -> SamplingParams:
    """What is None is as it is where nothing is said. Seeds are folded into 63 bits."""
    stop: list[str | int] = [*stops.texts, *dict.fromkeys((*stops.tokens, *ends))]
    return SamplingParams(
        max_tokens=max_tokens,
        seed=None if seed is None else seed % _SEEDS,
        stop=stop,
        temperature=1.0 if temperature is None else temperature,
        top_k=-1 if top_k in (None, 0) else top_k,
        top_p=1.0 if top_p is None else top_p,
    )
