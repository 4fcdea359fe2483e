import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lorry.actors.model.adapter import Adapter
from lorry.actors.model.base_model import BaseModel, wrap_model
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.model.survey import survey
from lorry.actors.sampling.decoder import BLOCK_TOKENS, Decoder
from lorry.actors.sampling.sequences import Usage
from lorry.wire.commands import SampleInput
from lorry.wire.errors import NonFiniteError
from lorry.wire.model_input import ModelInput
from lorry.wire.types import SampleResponse, SamplingParams

from .models import (
    tiny_deepseek_v3,
    tiny_gpt_oss,
    tiny_llama,
    tiny_qwen3,
    tiny_qwen3_moe,
    tiny_qwen3_vl,
    tiny_qwen3_vl_moe,
)
from .placing import chosen_ranks, placed


def tiny_sliding_qwen3() -> PreTrainedModel:
    return tiny_qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=1)


FAMILIES = [
    tiny_qwen3,
    tiny_sliding_qwen3,
    tiny_llama,
    tiny_qwen3_moe,
    tiny_gpt_oss,
    tiny_deepseek_v3,
    tiny_qwen3_vl,
    tiny_qwen3_vl_moe,
]
PROMPTS = [[5, 6, 7], [40, 2, 9, 9, 31, 60, 8], list(range(20, 50)), [3], [90, 1, 14, 15, 92, 65, 35]]


class Letters:
    """Token i is the i-th letter of a repeated alphabet."""

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(ord("a") + token % 26) for token in token_ids)


def new_decoder(base: BaseModel, max_rows: int = 8, prefill_chunk: int = 64, blocks: int = 400) -> Decoder:
    if chosen_ranks[0] > 1:
        base, _ = placed(base)
    bytes_of_a_block = survey(base).token_bytes * BLOCK_TOKENS
    return Decoder(base, Letters(), max_rows, prefill_chunk, blocks * bytes_of_a_block)


def request(prompt: Sequence[int], samples: int = 1, **options: Any) -> SampleInput:
    """Options that SampleInput has no field for are sampling parameters; without a stop, nothing stops it early."""
    extra = {name: options.pop(name) for name in tuple(options) if name in SampleInput.__struct_fields__}
    params = SamplingParams(**({"max_tokens": 8, "stop": []} | options))
    return SampleInput(ModelInput.from_ints(prompt), samples, params, **extra)


def run(decoder: Decoder) -> dict[Any, Any]:
    results = {}
    for _ in range(2000):
        if not decoder.active:
            return results
        results |= {key: result for key, result, _ in decoder.step()}
    raise AssertionError("the decoder does not come to an end")


def sample(base: BaseModel, wanted: SampleInput, adapter: Adapter | None = None, seed: int = 0) -> SampleResponse:
    """Alone, on a decoder of its own."""
    decoder = new_decoder(base, 8, 64)
    decoder.add("only", wanted, adapter, seed)
    return run(decoder)["only"]


def tokens_of(response: SampleResponse) -> list[list[int]]:
    return [sequence.tokens for sequence in response.sequences]


def plain_logprobs(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)  # [tokens, vocab]


def assert_is_the_models_own(model: PreTrainedModel, prompt: list[int], response: SampleResponse) -> None:
    for sequence in response.sequences:
        tokens = torch.tensor(prompt + sequence.tokens)
        expected = plain_logprobs(model, tokens.tolist())[:-1].gather(-1, tokens[1:, None]).squeeze(-1)
        found = torch.tensor([*(response.prompt_logprobs or [None])[1:], *sequence.logprobs])
        torch.testing.assert_close(found, expected[-len(found) :], rtol=0, atol=1e-4)


@functools.cache
def with_adapters() -> tuple[BaseModel, list[Adapter | None]]:
    """A base model, the bare base and three adapters of different ranks whose B is not zero."""
    base, targets = placed(wrap_model(tiny_qwen3()))
    adapters = [targets.new_adapter(AdapterSpec(rank=rank, seed=rank), "cpu", trainable=False) for rank in (2, 4, 8)]
    for adapter in adapters:
        generator = torch.Generator().manual_seed(adapter.spec.rank)
        adapter.weights.normal_(0, 0.1, generator=generator)
        adapter.refresh()
    return base, [None, *adapters]


def merged(adapter: Adapter | None) -> PreTrainedModel:
    model = tiny_qwen3()
    if adapter is not None:
        for name, (a, b) in adapter.module_weights().items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.nn.Parameter)
            weight.data += adapter.spec.scale * b.T @ a
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_samplers_logprobs_are_those_of_a_plain_forward(family: Callable[[], PreTrainedModel]) -> None:
    model, decoder = family(), new_decoder(wrap_model(family()), 4, 16)
    for i, prompt in enumerate(PROMPTS):
        decoder.add(i, request(prompt, 1 + i % 2, max_tokens=4 + 3 * i, include_prompt_logprobs=True), None, i)
    results = run(decoder)
    for i, prompt in enumerate(PROMPTS):
        assert_is_the_models_own(model, prompt, results[i])


def test_every_adapter_samples_from_its_own_model() -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base, 8, 32)
    for i, prompt in enumerate(PROMPTS):
        decoder.add(i, request(prompt, 2, include_prompt_logprobs=True), adapters[i % 4], i)
    results = run(decoder)
    for i, prompt in enumerate(PROMPTS):
        assert_is_the_models_own(merged(adapters[i % 4]), prompt, results[i])


def test_in_bfloat16_every_adapter_samples_from_its_own_model() -> None:
    _, adapters = with_adapters()
    base, targets = placed(wrap_model(tiny_qwen3().bfloat16()))
    decoder = new_decoder(base, 8, 32)
    for i, prompt in enumerate(PROMPTS):
        coarse = None
        if (adapter := adapters[i % 4]) is not None:
            coarse = targets.new_adapter(adapter.spec, "cpu", trainable=False)
            coarse.weights.copy_(adapter.weights)
            coarse.refresh()
        decoder.add(i, request(prompt, include_prompt_logprobs=True), coarse, i)
    results = run(decoder)
    for i, prompt in enumerate(PROMPTS):
        tokens = prompt + results[i].sequences[0].tokens
        found = [*results[i].prompt_logprobs[1:], *results[i].sequences[0].logprobs]
        models = [plain_logprobs(merged(adapter), tokens)[:-1] for adapter in adapters]
        gaps = [
            (torch.tensor(found) - logprobs.gather(-1, torch.tensor(tokens[1:])[:, None]).squeeze(-1)).abs().mean()
            for logprobs in models
        ]
        assert gaps.index(min(gaps)) == i % 4
        assert min(gaps) < 0.1 < sorted(gaps)[1] / 2


def test_a_cache_that_grows_keeps_what_it_holds() -> None:
    model, decoder = tiny_qwen3(), new_decoder(wrap_model(tiny_qwen3()), 8, 64)
    decoder.add("long", request(PROMPTS[0], max_tokens=150), None, 0)
    for _ in range(40):
        decoder.step()
    decoder.add("late", request(PROMPTS[2], 4, max_tokens=50), None, 1)
    results = run(decoder)
    assert_is_the_models_own(model, PROMPTS[0], results["long"])
    assert_is_the_models_own(model, PROMPTS[2], results["late"])


@pytest.mark.parametrize("family", [tiny_qwen3, tiny_llama])
def test_greedy_decoding_gives_the_tokens_of_generate(family: Callable[[], PreTrainedModel]) -> None:
    model, decoder = family(), new_decoder(wrap_model(family()), 8, 64)
    for i, prompt in enumerate(PROMPTS):
        decoder.add(i, request(prompt, max_tokens=20, temperature=0, stop=None), None, i)
    results = run(decoder)
    for i, prompt in enumerate(PROMPTS):
        generated = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert results[i].sequences[0].tokens == generated[0, len(prompt) :].tolist()


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    base, _ = with_adapters()
    first, again, other = (sample(base, request(PROMPTS[0], 3, seed=seed)) for seed in (1, 1, 2))
    assert tokens_of(first) == tokens_of(again)
    assert len({tuple(tokens) for response in (first, other) for tokens in tokens_of(response)}) == 6


def test_a_request_without_a_seed_takes_the_default_one() -> None:
    base, _ = with_adapters()
    explicit, default = request(PROMPTS[0], seed=5), request(PROMPTS[0])
    assert tokens_of(sample(base, explicit)) == tokens_of(sample(base, default, seed=5))


WANTED = [request(p, 1 + i % 3, max_tokens=2 + 2 * i, temperature=i / 2, top_p=0.9) for i, p in enumerate(PROMPTS)]


@functools.cache
def alone() -> list[list[list[int]]]:
    base, adapters = with_adapters()
    return [tokens_of(sample(base, wanted, adapters[i % 4], seed=i)) for i, wanted in enumerate(WANTED)]


@settings(deadline=None, max_examples=30)
@given(
    arrivals=st.lists(st.integers(0, 12), min_size=len(WANTED), max_size=len(WANTED)),
    cancelled=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    rows=st.integers(1, 9),
    prefill_chunk=st.integers(1, 80),
    blocks=st.integers(4, 20),
)
def test_whoever_joins_and_leaves_changes_nobodys_tokens(
    arrivals: list[int], cancelled: tuple[int, int], rows: int, prefill_chunk: int, blocks: int
) -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base, rows, prefill_chunk, blocks)
    results: dict[Any, Any] = {}
    for step in range(13):
        if step == min(cancelled):
            decoder.add("passer-by", request(PROMPTS[1], 2, max_tokens=50), adapters[3], 99)
        if step == max(cancelled):
            decoder.cancel("passer-by")
        for i, arrival in enumerate(arrivals):
            if arrival == step:
                decoder.add(i, WANTED[i], adapters[i % 4], i)
        results |= {key: result for key, result, _ in decoder.step()}
    results |= run(decoder)
    assert [tokens_of(results[i]) for i in range(len(WANTED))] == alone()


def test_the_prompt_of_several_samples_is_computed_once() -> None:
    base, _ = with_adapters()
    decoder = new_decoder(base, 8, 64)
    decoder.add("eight", request(PROMPTS[1], 8), None, 0)
    response = run(decoder)["eight"]
    assert decoder.prompts_computed == 1
    assert len({tuple(tokens) for tokens in tokens_of(response)}) == 8


def test_a_request_of_more_samples_than_rows_gets_them_all_in_order() -> None:
    base, _ = with_adapters()
    decoder = new_decoder(base, 2, 64)
    decoder.add("five", request(PROMPTS[1], 5), None, 7)
    usages = [usage for _ in range(100) for _, _, usage in decoder.step()]
    assert [(u.prefill_tokens, u.sample_tokens) for u in usages] == [(len(PROMPTS[1]), 40)]
    decoder.add("five", request(PROMPTS[1], 5), None, 7)
    assert tokens_of(run(decoder)["five"]) == tokens_of(sample(base, request(PROMPTS[1], 5), seed=7))


def test_more_requests_than_rows_all_finish() -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base, 3, 8)
    for i in range(20):
        decoder.add(i, request(PROMPTS[i % 5], 1 + i % 2, max_tokens=1 + i % 4), adapters[i % 4], i)
    results = run(decoder)
    assert [[len(s.tokens) for s in results[i].sequences] for i in range(20)] == [
        [1 + i % 4] * (1 + i % 2) for i in range(20)
    ]


def test_a_stop_token_ends_its_sequence_and_stays_in_it() -> None:
    base, _ = with_adapters()
    tokens = sample(base, request(PROMPTS[0])).sequences[0].tokens
    stopped = sample(base, request(PROMPTS[0], stop=[tokens[3]])).sequences[0]
    assert (stopped.stop_reason, stopped.tokens) == ("stop", tokens[: tokens.index(tokens[3]) + 1])
    assert len(stopped.logprobs) == len(stopped.tokens)


def test_a_stop_string_ends_its_sequence_with_the_token_that_completes_it() -> None:
    base, _ = with_adapters()
    tokens = sample(base, request(PROMPTS[0])).sequences[0].tokens
    stopped = sample(base, request(PROMPTS[0], stop=Letters().decode(tokens[2:5]))).sequences[0]
    assert (stopped.stop_reason, stopped.tokens) == ("stop", tokens[:5])


def test_without_a_stop_the_models_end_tokens_end_a_sequence_and_an_empty_list_lets_it_run() -> None:
    tokens = sample(wrap_model(tiny_qwen3()), request(PROMPTS[0])).sequences[0].tokens
    model = tiny_qwen3()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [tokens[2]]
    base = wrap_model(model)
    ended = sample(base, request(PROMPTS[0], stop=None)).sequences[0]
    assert (ended.stop_reason, ended.tokens) == ("stop", tokens[: tokens.index(tokens[2]) + 1])
    endless = sample(base, request(PROMPTS[0], stop=[])).sequences[0]
    assert (endless.stop_reason, endless.tokens) == ("length", tokens)


def test_a_sequence_ends_where_the_models_context_does() -> None:
    base = wrap_model(tiny_qwen3(max_position_embeddings=16))
    sequence = sample(base, request(PROMPTS[0], max_tokens=None)).sequences[0]
    assert (sequence.stop_reason, len(sequence.tokens)) == ("length", 16 - len(PROMPTS[0]))


def test_a_cancelled_request_frees_its_rows_and_reports_nothing() -> None:
    base, _ = with_adapters()
    decoder = new_decoder(base, 2, 64)
    decoder.add("running", request(PROMPTS[0], 2, max_tokens=200), None, 0)
    decoder.add("waiting", request(PROMPTS[1], 2), None, 0)
    decoder.add("next", request(PROMPTS[2], 2), None, 3)
    decoder.step()
    decoder.step()
    cancelled = decoder.cancel("running")
    assert cancelled is not None, "what was computed for it by then is told"
    assert cancelled.prefill_tokens == len(PROMPTS[0])
    assert 2 <= cancelled.sample_tokens <= 4
    assert decoder.cancel("waiting") == Usage(0, 0)
    assert decoder.cancel("nobody") is None
    results = run(decoder)
    assert list(results) == ["next"]
    assert tokens_of(results["next"]) == tokens_of(sample(base, request(PROMPTS[2], 2), seed=3))


def test_the_likeliest_tokens_of_prompt_and_samples_are_those_of_a_plain_forward() -> None:
    base, adapters = with_adapters()
    prompt = PROMPTS[2]
    wanted = request(prompt, temperature=0.7, topk_prompt_logprobs=3, topk_sample_logprobs=2)
    decoder = new_decoder(base, 8, 64)
    decoder.add("plain", request(PROMPTS[0]), None, 0)
    decoder.add("top", wanted, adapters[1], 0)
    response = run(decoder)["top"]
    sequence = response.sequences[0]
    with torch.no_grad():
        logits = merged(adapters[1])(torch.tensor([prompt + sequence.tokens]), use_cache=False).logits[0]
    of_prompt = logits[: len(prompt) - 1].log_softmax(-1).topk(3)
    of_samples = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1).topk(2)
    for expected, found in ((of_prompt, response.topk_prompt_logprobs[1:]), (of_samples, sequence.topk_logprobs)):
        assert [[token for token, _ in row] for row in found] == expected.indices.tolist()
        values = torch.tensor([[logprob for _, logprob in row] for row in found])
        torch.testing.assert_close(values, expected.values, rtol=0, atol=1e-4)
    assert response.topk_prompt_logprobs[0] is None


def test_prompts_alone_are_scored_without_taking_rows() -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base, 1, 64)
    decoder.add("long", request(PROMPTS[0], max_tokens=100), None, 0)
    decoder.step()
    for i, prompt in enumerate(PROMPTS):
        decoder.add_prompt(i, ModelInput.from_ints(prompt), adapters[i % 4])
    results = {key: (result, usage) for key, result, usage in decoder.step()}
    assert set(results) == set(range(len(PROMPTS)))
    for i, prompt in enumerate(PROMPTS):
        response, usage = results[i]
        assert (response.sequences, usage.prefill_tokens, usage.sample_tokens) == ([], len(prompt), 0)
        assert response.prompt_logprobs[0] is None
        expected = plain_logprobs(merged(adapters[i % 4]), prompt)[:-1].gather(-1, torch.tensor(prompt[1:])[:, None])
        torch.testing.assert_close(torch.tensor(response.prompt_logprobs[1:]), expected.squeeze(-1), rtol=0, atol=1e-4)


def poisoned(adapter: Adapter | None) -> Adapter:
    assert adapter is not None
    bad = Adapter(adapter.spec, adapter.targets, trainable=False)
    bad.weights.copy_(adapter.weights)
    bad.weights[0] = math.nan
    bad.refresh()
    return bad


def test_logits_that_are_not_finite_fail_their_own_request_alone() -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base, 8, 64)
    decoder.add("before", request(PROMPTS[1], 2), adapters[1], 1)
    decoder.add("bad", request(PROMPTS[2], 3, include_prompt_logprobs=True), poisoned(adapters[2]), 2)
    decoder.add("after", request(PROMPTS[0], 2), None, 3)
    results = run(decoder)
    assert isinstance(results["bad"], NonFiniteError)
    assert tokens_of(results["before"]) == tokens_of(sample(base, request(PROMPTS[1], 2), adapters[1], seed=1))
    assert tokens_of(results["after"]) == tokens_of(sample(base, request(PROMPTS[0], 2), None, seed=3))


def test_a_row_that_held_nan_serves_the_next_sequence() -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base, 2, 64)
    decoder.add("bad", request(PROMPTS[2]), poisoned(adapters[2]), 2)
    assert isinstance(run(decoder)["bad"], NonFiniteError)
    decoder.add("short", request(PROMPTS[0]), None, 1)
    decoder.add("long", request(PROMPTS[4], max_tokens=60), None, 1)
    assert tokens_of(run(decoder)["short"]) == tokens_of(sample(base, request(PROMPTS[0]), seed=1))


def test_the_model_trains_after_it_has_sampled() -> None:
    base, targets = placed(wrap_model(tiny_qwen3()))
    adapter = targets.new_adapter(AdapterSpec(rank=4), "cpu")
    sample(base, request(PROMPTS[2], include_prompt_logprobs=True), adapter)
    assert (base.in_flight.segments, base.in_flight.cache, base.in_flight.linears) == ([], None, None)
    base.in_flight.lengths = [3]
    with base.alone():
        hidden = base.hidden_states(torch.tensor([1, 2, 3]), torch.arange(3), grad=True)
        hidden.sum().backward()
    assert not hidden.is_inference()
