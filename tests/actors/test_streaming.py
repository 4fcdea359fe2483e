"""Tokens told as they are made, and sequences that go on where another decoder was lost."""

from typing import Any

import pytest
from transformers import PreTrainedModel

from lorry.actors.model.base_model import BaseModel, wrap_model
from lorry.actors.sampling.decoder import Decoder
from lorry.actors.sampling.sequences import Usage
from lorry.wire.commands import SampleInput
from lorry.wire.streaming import Assembly
from lorry.wire.types import SampleResponse

from .models import tiny_gpt_oss, tiny_qwen3
from .test_decoder import PROMPTS, new_decoder, request, run, tokens_of

WANTED = request(PROMPTS[1], samples=3, max_tokens=9, seed=5, topk_sample_logprobs=2, stop=[7, 11, 13])
PLAIN = request(PROMPTS[2], samples=2, max_tokens=6, seed=6)


@pytest.fixture(scope="module", params=[tiny_qwen3, tiny_gpt_oss])
def base(request: Any) -> BaseModel:
    make: Any = request.param
    model: PreTrainedModel = make()
    return wrap_model(model)


def streamed(
    decoder: Decoder, told: Assembly, steps: int | None = None
) -> tuple[dict[Any, SampleResponse], dict[Any, Usage]]:
    """What ended in so many steps, and what it used; `told` gets what is told, each token once and in order."""
    ended, used = dict[Any, SampleResponse](), dict[Any, Usage]()
    while decoder.active and steps != 0:
        finished = decoder.step()
        for key, pieces in decoder.pieces():
            assert key == "streams" and key not in {each[0] for each in finished}
            assert [piece.start for piece in pieces] == [len(told.told[piece.sample].tokens) for piece in pieces]
            assert told.add(pieces) == pieces
        ended |= {key: result for key, result, _ in finished}
        used |= {key: usage for key, _, usage in finished}
        steps = None if steps is None else steps - 1
    return ended, used


def alone(base: BaseModel, wanted: SampleInput) -> SampleResponse:
    decoder = new_decoder(base)
    decoder.add("streams", wanted, None, 0)
    return run(decoder)["streams"]


def test_who_streams_is_told_each_token_once_and_nobody_else_any(base: BaseModel) -> None:
    decoder = new_decoder(base)
    decoder.add("plain", PLAIN, None, 0)
    decoder.add("streams", WANTED, None, 0, streams=True)
    assembly = Assembly(3)
    ended, _ = streamed(decoder, assembly)
    assert tokens_of(ended["streams"]) == tokens_of(alone(base, WANTED))
    assert tokens_of(ended["plain"]) == tokens_of(alone(base, PLAIN))
    rest = assembly.rest(ended["streams"])
    assert sum(len(piece.tokens) for piece in rest) <= 3, "only what ended with the last step"
    for told, sequence in zip(assembly.told, ended["streams"].sequences, strict=True):
        assert (told.tokens, told.logprobs) == (sequence.tokens, sequence.logprobs)
        assert (told.topk_logprobs, told.stop_reason) == (sequence.topk_logprobs, sequence.stop_reason)


@pytest.mark.parametrize("steps", (1, 2, 4, 7))
def test_another_decoder_goes_on_where_one_was_lost(base: BaseModel, steps: int) -> None:
    expected = alone(base, WANTED)
    lost = new_decoder(base)
    lost.add("streams", WANTED, None, 0, streams=True)
    assembly = Assembly(3)
    ended, _ = streamed(lost, assembly, steps)
    assert not ended
    heir = new_decoder(base)
    heir.add("plain", PLAIN, None, 0)
    heir.add("streams", WANTED, None, 0, streams=True, made=assembly.told)
    ended, used = streamed(heir, assembly)
    result = ended["streams"]
    assert tokens_of(result) == tokens_of(expected)
    assert [s.stop_reason for s in result.sequences] == [s.stop_reason for s in expected.sequences]
    assert [s.topk_logprobs and len(s.topk_logprobs) for s in result.sequences] == [
        len(s.tokens) for s in result.sequences
    ]
    assert used["streams"].prefill_tokens == len(PROMPTS[1])
    assert used["streams"].sample_tokens == sum(len(s.tokens) for s in expected.sequences)
    assembly.rest(result)


def test_one_whose_sequences_were_all_over_ends_at_once(base: BaseModel) -> None:
    expected = alone(base, WANTED)
    whole = Assembly(3)
    whole.rest(expected)
    heir = new_decoder(base)
    heir.add("streams", WANTED, None, 0, streams=True, made=whole.told)
    assert heir.active
    [(key, result, usage)] = heir.step()
    assert (key, tokens_of(result)) == ("streams", tokens_of(expected))
    assert usage.sample_tokens == sum(len(s.tokens) for s in expected.sequences)
    assert not heir.active and heir.pool.free == heir.pool.blocks


def test_the_prompts_logprobs_come_too_where_all_sequences_were_over(base: BaseModel) -> None:
    wanted = request(PROMPTS[1], samples=3, max_tokens=4, seed=5, include_prompt_logprobs=True)
    expected = alone(base, wanted)
    whole = Assembly(3)
    whole.rest(expected)
    heir = new_decoder(base)
    heir.add("streams", wanted, None, 0, streams=True, made=whole.told)
    result = run(heir)["streams"]
    assert result.prompt_logprobs[1:] == pytest.approx(expected.prompt_logprobs[1:], abs=1e-5)
    assert tokens_of(result) == tokens_of(expected)
