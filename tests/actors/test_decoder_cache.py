"""What the decoder computes once, shares, gives up and computes again; and that no token changes by it."""

import math
from typing import Any

import pytest
import torch

from lorry.actors.adapters.slots import AdapterPool
from lorry.actors.model.base_model import load_base_model, wrap_model
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.sampling.decoder import BLOCK_TOKENS, Decoder
from lorry.actors.training.engine import Engine, ForwardBackwardJob
from lorry.wire.commands import ForwardBackwardInput, check_sample
from lorry.wire.errors import InvalidRequestError
from lorry.wire.model_input import ModelInput
from lorry.wire.types import Datum, ForwardBackwardOutput, TensorData

from .models import tiny_deepseek_v3, tiny_gpt_oss, tiny_qwen3
from .placing import placed
from .test_decoder import PROMPTS, assert_is_the_models_own, new_decoder, request, run, sample, tokens_of, with_adapters
from .test_demo_model import ASSETS

LONG = [(7 * i + 3) % 90 for i in range(70)]


def cached_tokens(decoder: Decoder, key: str) -> int:
    for _ in range(500):
        for found, _, usage in decoder.step():
            if found == key:
                return usage.cached_tokens
    raise AssertionError("the request does not end")


def test_the_prompt_of_64_samples_is_computed_once() -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base, 64, 64)
    decoder.add("many", request(PROMPTS[2], 64, max_tokens=5), adapters[1], 0)
    response = run(decoder)["many"]
    assert decoder.prompts_computed == 1
    assert decoder.tokens_computed == len(PROMPTS[2]) + 64 * 4  # the last token of a sample is never computed
    assert len({tuple(tokens) for tokens in tokens_of(response)}) == 64


def test_samples_share_the_full_blocks_of_their_prompt_and_copy_the_last_one() -> None:
    base, _ = with_adapters()
    decoder = new_decoder(base, 8, 128)
    decoder.add("many", request(LONG, 8, max_tokens=5), None, 0)
    decoder.step()
    full = len(LONG) // BLOCK_TOKENS
    assert decoder.pool.blocks - decoder.pool.free == full + 8


def test_a_later_request_of_the_same_owner_finds_its_prefix_computed() -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base)
    first, second = request(LONG, seed=1), request([*LONG[:40], 5, 6, 7], seed=2)
    decoder.add("first", first, adapters[1], 0, "weights 1")
    assert cached_tokens(decoder, "first") == 0
    before = decoder.tokens_computed
    decoder.add("second", second, adapters[1], 0, "weights 1")
    decoder.add("again", first, adapters[1], 0, "weights 1")
    usages: dict[Any, int] = {}
    results: dict[Any, Any] = {}
    while decoder.active:
        for key, result, usage in decoder.step():
            usages[key], results[key] = usage.cached_tokens, result
    assert usages == {"second": 32, "again": 64}
    assert decoder.tokens_computed - before == 43 - 32 + 70 - 64 + 2 * 7
    assert tokens_of(results["second"]) == tokens_of(sample(base, second, adapters[1]))
    assert tokens_of(results["again"]) == tokens_of(sample(base, first, adapters[1]))


def test_a_conversation_finds_what_was_sampled_before_computed() -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base)
    decoder.add("turn 1", request(LONG[:20], max_tokens=30), adapters[1], 0, "weights 1")
    said = tokens_of(run(decoder)["turn 1"])[0]
    decoder.add("turn 2", request([*LONG[:20], *said, 1, 2]), adapters[1], 0, "weights 1")
    assert cached_tokens(decoder, "turn 2") == 48


@pytest.mark.parametrize("owner", ["weights 2", None])
def test_a_changed_adapter_never_reuses_a_prefix(owner: str | None) -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base)
    decoder.add("old", request(LONG), adapters[1], 0, "weights 1" if owner else None)
    run(decoder)
    decoder.add("new", request(LONG, seed=3), adapters[2], 0, owner)
    assert cached_tokens(decoder, "new") == 0


def test_prompt_logprobs_are_all_there_though_the_prompt_was_known() -> None:
    base, _ = with_adapters()
    decoder = new_decoder(base)
    decoder.add("first", request(LONG), None, 0, "base")
    run(decoder)
    decoder.add("scored", request(LONG, include_prompt_logprobs=True), None, 0, "base")
    assert_is_the_models_own(tiny_qwen3(), LONG, run(decoder)["scored"])
    decoder.add("last", request(LONG, include_prompt_logprobs=True, prompt_logprobs_last_n=5), None, 0, "base")
    results = {key: (result, usage) for _ in range(20) for key, result, usage in decoder.step()}
    response, usage = results["last"]
    assert response.prompt_logprobs[:-5] == [None] * (len(LONG) - 5)
    assert None not in response.prompt_logprobs[-5:]
    assert usage.cached_tokens == 64


def test_other_tokens_are_scored_and_drawn_in_chunks_as_the_model_has_them() -> None:
    decoder = new_decoder(wrap_model(tiny_qwen3()), 8, 13)
    with torch.no_grad():
        expected = tiny_qwen3()(torch.tensor([LONG])).logits[0, :-1].log_softmax(-1)  # [prompt - 1, vocab]
    targets = torch.randint(0, expected.shape[1], (len(LONG) - 1, 3))
    targets[5, 1] = -1
    wanted = TensorData.from_torch(targets)
    decoder.add("one", request(LONG, target_prompt_logprobs=wanted, prompt_alt_tokens_k=40), None, 7)
    response = run(decoder)["one"]
    assert response.prompt_logprobs is None
    found = response.target_prompt_logprobs.to_torch()
    assert found[5, 1].isnan()
    found[5, 1] = 0
    torch.testing.assert_close(found, expected.gather(1, targets.clamp(min=0)) * (targets >= 0), rtol=1e-4, atol=1e-4)
    drawn, logprobs = (
        tensor.to_torch() for tensor in (response.prompt_alt_tokens.tokens, response.prompt_alt_tokens.logprobs)
    )
    torch.testing.assert_close(logprobs, expected.gather(1, drawn), rtol=1e-4, atol=1e-4)
    # 69 x 40 draws: their mean surprise is the distributions' entropy, within five standard errors.
    entropy = -(expected.exp() * expected).sum(-1).mean()
    error = logprobs.std() / math.sqrt(logprobs.numel())
    assert abs(-logprobs.mean() - entropy) < 5 * error


def test_shown_logprobs_stay_the_last_ones_where_all_are_computed_for_the_targets() -> None:
    base, _ = with_adapters()
    decoder = new_decoder(base)
    options = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2, "prompt_logprobs_last_n": 5}
    decoder.add("one", request(LONG, prompt_alt_tokens_k=1, **options), None, 0)
    decoder.add("other", request(LONG, **options), None, 0)
    results = run(decoder)
    one, other = results["one"], results["other"]
    assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs)
    assert [row and [token for token, _ in row] for row in one.topk_prompt_logprobs] == [
        row and [token for token, _ in row] for row in other.topk_prompt_logprobs
    ]


@pytest.mark.parametrize("family", [tiny_qwen3, tiny_gpt_oss, tiny_deepseek_v3])
def test_a_prompt_computed_in_chunks_beside_decoding_rows_is_the_models_own(family: Any) -> None:
    decoder = new_decoder(wrap_model(family()), 8, 13)
    decoder.add("row", request(PROMPTS[1], max_tokens=30), None, 0)
    decoder.step()
    decoder.add("long", request(LONG, 2, include_prompt_logprobs=True), None, 0)
    results = run(decoder)
    assert_is_the_models_own(family(), LONG, results["long"])
    assert_is_the_models_own(family(), PROMPTS[1], results["row"])


def test_who_gives_way_when_blocks_run_out_samples_the_same_tokens_later() -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base, 8, 32, blocks=6)
    wanted = [request(PROMPTS[i], 1 + i % 2, max_tokens=40, seed=i) for i in range(3)]
    for i, one in enumerate(wanted):
        decoder.add(i, one, adapters[i + 1], 0)
    results = run(decoder)
    assert decoder.lineup.preemptions > 0
    for i, one in enumerate(wanted):
        assert tokens_of(results[i]) == tokens_of(sample(base, one, adapters[i + 1]))


def test_a_request_that_outgrows_the_cache_alone_is_refused_at_once_and_others_go_on() -> None:
    base, _ = with_adapters()
    decoder = new_decoder(base, 8, 32, blocks=4)
    decoder.add("fits", request(PROMPTS[1], max_tokens=58), None, 0)
    with pytest.raises(InvalidRequestError, match="at most 65 tokens"):
        decoder.add("too long", request(PROMPTS[1], max_tokens=59), None, 0)
    with pytest.raises(InvalidRequestError, match=r"prompt\.length is 65, expected at most 64"):
        decoder.add_prompt("too long", ModelInput.from_ints(LONG[:65]), None)
    assert list(run(decoder)) == ["fits"]


def test_cancelling_frees_the_blocks_before_the_next_step() -> None:
    base, adapters = with_adapters()
    decoder = new_decoder(base, 8, 16)
    decoder.add("samples", request(LONG[:30], 4, max_tokens=50), adapters[1], 0)
    for _ in range(5):
        decoder.step()
    decoder.add("half a prompt", request(LONG), adapters[2], 0)
    decoder.step()
    assert decoder.pool.free < decoder.pool.blocks - 5
    decoder.cancel("samples")
    decoder.cancel("half a prompt")
    assert decoder.pool.free == decoder.pool.blocks
    assert decoder.step() == []


def logprobs_of_trainer(engine: Engine, sequences: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Of every sequence's sampled tokens, by the engine's forward. Sequences are (prompt, sampled)."""
    data = []
    for prompt, sampled in sequences:
        tokens = prompt + sampled
        targets = TensorData(tokens[1:], "int64")
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": targets}))
    outcome = engine.forward_backward([ForwardBackwardJob("run", ForwardBackwardInput(data, "cross_entropy"), False)])
    assert isinstance(outcome[0], ForwardBackwardOutput)
    return [
        output["logprobs"].to_torch()[len(prompt) - 1 :]
        for output, (prompt, _) in zip(outcome[0].loss_fn_outputs, sequences, strict=True)
    ]


@pytest.mark.parametrize("new", [1, None], ids=["one token", "as many as there is room for"])
def test_a_prompt_that_fills_the_context_is_scored_and_one_token_drawn_as_the_trainer_has_them(new: int | None) -> None:
    base, targets = placed(wrap_model(tiny_qwen3(max_position_embeddings=48)))
    adapter = targets.new_adapter(AdapterSpec(rank=4), base.device)
    adapter.weights.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    adapter.refresh()
    prompt = LONG[: base.max_context]
    wanted = request(prompt, 2, max_tokens=new, include_prompt_logprobs=True, seed=3)
    check_sample(wanted, base.vocab_size, base.max_context)
    decoder = new_decoder(base, 4, 20, blocks=3)
    decoder.add("full", wanted, adapter, 0)
    response = run(decoder)["full"]
    pool = AdapterPool(1, base.device)
    pool.add("run", adapter)
    drawn = [sequence.tokens for sequence in response.sequences]
    assert [len(tokens) for tokens in drawn] == [1, 1]
    expected = logprobs_of_trainer(Engine(base, targets, pool), [(prompt[:1], prompt[1:] + tokens) for tokens in drawn])
    for sequence, own in zip(response.sequences, expected, strict=True):
        found = torch.tensor([*response.prompt_logprobs[1:], *sequence.logprobs])
        torch.testing.assert_close(found, own, rtol=0, atol=1e-4)


def test_after_a_prompt_that_fills_the_context_no_second_token_is_drawn() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens is 2, expected at most 1"):
        check_sample(request(LONG[:48], max_tokens=2), 97, 48)
    with pytest.raises(InvalidRequestError, match=r"prompt\.length is 49, expected at most 48"):
        check_sample(request(LONG[:49], max_tokens=1), 97, 48)
    check_sample(request(LONG[:47], max_tokens=1), 97, 48)


def test_10_000_sampled_logprobs_are_the_trainers_within_1e_4() -> None:
    base, targets = placed(load_base_model(ASSETS / "base-model", dtype="float32"))
    adapter = targets.new_adapter(AdapterSpec(rank=8), base.device)
    adapter.weights.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    adapter.refresh()
    decoder = new_decoder(base, 64, 512, blocks=2000)
    prompts = [[(11 * i + j) % 2000 for j in range(20 + i)] for i in range(4)]
    for i, prompt in enumerate(prompts):
        decoder.add(i, request(prompt, 16, max_tokens=160, seed=i), adapter, 0)
    results = run(decoder)
    found = [(prompts[i], sequence) for i in range(4) for sequence in results[i].sequences]
    assert sum(len(sequence.tokens) for _, sequence in found) >= 10_000
    pool = AdapterPool(1, base.device)
    pool.add("run", adapter)
    expected = logprobs_of_trainer(
        Engine(base, targets, pool, token_budget=2048), [(prompt, sequence.tokens) for prompt, sequence in found]
    )
    worst = max(
        float((torch.tensor(sequence.logprobs) - own).abs().max())
        for (_, sequence), own in zip(found, expected, strict=True)
    )
    assert math.isfinite(worst) and worst <= 1e-4
