"""One prompt, sampled of base models and adapters side by side, with how likely each token was."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
from fastapi import APIRouter
from starlette.responses import Response

from ...wire.commands import SampleInput
from ...wire.errors import InvalidRequestError, LorryError
from ...wire.model_input import ModelInput
from ...wire.types import SampledSequence, SamplingParams
from ..chat.detokenizing import Detokenizer
from ..chat.models import Desk, listed, meant_by
from ..chat.sampling import Chosen, accepted
from ..chat.tokenizers import Tokenizer
from ..chat.vocabulary import Vocabulary
from .forms import Form, FormOf
from .rendering import page
from .visiting import Visitor, VisitorOf

router = APIRouter()

_INSTEAD = 4
_MODELS_AT_ONCE = 6
_MODELS_OFFERED = 100
_BOUNDS = (0.5, 0.1, 0.02, 0.002)
"""Probabilities at which a token gets another colour."""


@dataclass(frozen=True, slots=True)
class Token:
    """`text` may be empty where a character is not complete yet; `name` is the token's alone. `likely` is a class of
    probability, 4 the highest. `instead` are the likeliest others, with their probabilities."""

    text: str
    name: str
    probability: float
    likely: int
    instead: Sequence[tuple[str, float]]


@dataclass(slots=True)
class Answer:
    """What one model made of the prompt; `problem` says why it made nothing."""

    model: str
    tokens: Sequence[Token] = ()
    stop_reason: str = ""
    problem: str = ""

    @property
    def mean_logprob(self) -> float | None:
        if not self.tokens:
            return None
        return sum(math.log(max(token.probability, 1e-45)) for token in self.tokens) / len(self.tokens)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the form holds, as it was sent."""

    prompt: str = ""
    models: Sequence[str] = field(default_factory=list[str])
    as_chat: bool = False
    max_tokens: int = 64
    temperature: float = 0.7
    seed: int | None = None


@router.get("/playground")
async def playground(visitor: VisitorOf, model: str = "") -> Response:
    return await _shown(visitor, Asked(models=[model] if model else []), [])


@router.post("/playground")
async def play(visitor: VisitorOf, form: FormOf) -> Response:
    asked = asked_of(form)
    answers = [Answer(model) for model in asked.models]
    async with anyio.create_task_group() as tasks:
        for answer in answers:
            tasks.start_soon(_answer, visitor, asked, answer)
    return await _shown(visitor, asked, answers)


def asked_of(form: Form) -> Asked:
    """Raises InvalidRequestError."""
    models = list(dict.fromkeys(form.texts("model")))
    if not 0 < len(models) <= _MODELS_AT_ONCE:
        raise InvalidRequestError.of("model", len(models), f"between 1 and {_MODELS_AT_ONCE} models")
    temperature = form.number("temperature", float)
    return Asked(
        form.text("prompt"),
        models,
        form.text("as_chat") == "on",
        form.number("max_tokens", int) or 64,
        0.7 if temperature is None else temperature,
        form.number("seed", int),
    )


async def _shown(visitor: Visitor, asked: Asked, answers: Sequence[Answer]) -> Response:
    """What was asked for is offered, too, be it somebody else's or no longer among the newest."""
    models = (await listed(visitor.broker))[:_MODELS_OFFERED]
    named = [model.name for model in models]
    others = [name for name in asked.models if name not in named]
    return page(visitor, "playground.html", models=named, others=others, asked=asked, answers=answers)


async def _answer(visitor: Visitor, asked: Asked, answer: Answer) -> None:
    """One model's mistake is not the others'."""
    try:
        await _sample(visitor, asked, answer)
    except LorryError as error:
        answer.problem = str(error)
    except TimeoutError:
        answer.problem = "The broker did not answer in time."


async def _sample(visitor: Visitor, asked: Asked, answer: Answer) -> None:
    gateway = visitor.request.app.state.gateway
    desk: Desk = gateway.desk
    chosen = Chosen(desk, visitor.broker, await meant_by(visitor.broker, answer.model), gateway.config.long_poll_s)
    tokenizer = await desk.tokenizers.get((await chosen.info()).tokenizer_id)
    tokens = await desk.tokenizers.work(lambda: _encoded(tokenizer, asked))
    params = SamplingParams(max_tokens=asked.max_tokens, temperature=asked.temperature, seed=asked.seed)
    wanted = SampleInput(
        prompt=ModelInput.from_ints(tokens), num_samples=1, sampling_params=params, topk_sample_logprobs=_INSTEAD + 1
    )
    async with accepted(chosen, wanted) as sample:
        (sequence,) = (await sample.response()).sequences
    answer.stop_reason = sequence.stop_reason
    answer.tokens = await desk.tokenizers.work(lambda: spelt(tokenizer.vocabulary, sequence))


def _encoded(tokenizer: Tokenizer, asked: Asked) -> list[int]:
    """Raises InvalidRequestError for a chat with a model that has no template."""
    if not asked.as_chat:
        return tokenizer.encode(asked.prompt, special=True)
    if not tokenizer.has_template:
        raise InvalidRequestError.of("as_chat", "on", "off, for this model's tokenizer has no chat template")
    text = tokenizer.render([{"role": "user", "content": asked.prompt}], None, {})
    return tokenizer.encode(text, special=False)


def spelt(vocabulary: Vocabulary, sequence: SampledSequence) -> list[Token]:
    """Each token with what it adds to the text: half of a character is told with its other half."""
    detokenizer = Detokenizer(vocabulary)
    texts = [detokenizer.feed(token) for token in sequence.tokens]
    if texts:
        texts[-1] += detokenizer.flush()
    likeliest = sequence.topk_logprobs or [[]] * len(texts)
    found: list[Token] = []
    for token, text, logprob, others in zip(sequence.tokens, texts, sequence.logprobs, likeliest, strict=True):
        chance = min(1.0, math.exp(logprob))
        instead = [(vocabulary.name_of(each), math.exp(other)) for each, other in others if each != token]
        found.append(Token(text, vocabulary.name_of(token), chance, likely(chance), instead[:_INSTEAD]))
    return found


def likely(probability: float) -> int:
    return sum(probability >= bound for bound in _BOUNDS)
