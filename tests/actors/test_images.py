import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lorry.actors.images.layout import Counted, Placed, Stretch, count_images, lay_out_positions, positions_of
from lorry.actors.images.looking import Read, read
from lorry.actors.images.pictures import Digest, Picture
from lorry.actors.images.structure import Structure
from lorry.actors.model.base_model import BaseModel
from lorry.actors.model.spec import AdapterSpec
from lorry.wire.commands import ForwardBackwardInput, SampleInput
from lorry.wire.model_input import EncodedTextChunk, ModelInput
from lorry.wire.types import Datum, SampleResponse, SamplingParams, TensorData

from .models import tiny_qwen3_vl, tiny_qwen3_vl_moe
from .pictures import IMAGE, as_the_model_takes, between, chunk, wrap_with_eyes
from .reference import PeftRun
from .test_decoder import new_decoder, run, tokens_of
from .workshop import VOCAB, Workshop, assert_close, job, logprobs

FAMILIES = [tiny_qwen3_vl, tiny_qwen3_vl_moe]

NONE = between([5, 6, 7, 8, 9])
ONE = between([1, 2, 3], chunk(24, 16, 1), [4, 5])
FIRST = ModelInput([chunk(8, 8, 2), *between([7, 3]).chunks])
THREE = between([9], chunk(40, 16, 3), [10, 11], chunk(16, 48, 4), chunk(32, 32, 5), [12])
EACH = [NONE, ONE, FIRST, THREE]


def counted(tokens: ModelInput, base: BaseModel) -> Counted:
    return count_images("prompt", tokens, base.eyes, base.max_context)


def read_in(base: BaseModel, tokens: ModelInput) -> Read:
    return read(counted(tokens, base), base.eyes)


def data_of(inputs: list[ModelInput], base: BaseModel, seed: int = 0) -> ForwardBackwardInput:
    """With random targets and weights. How many tokens the images are is left to the engine."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [counted(tokens, base).tokens.length for tokens in inputs]
    data = [
        Datum(
            tokens,
            {
                "target_tokens": TensorData.from_torch(torch.randint(0, VOCAB, (n,), generator=generator)),
                "weights": TensorData.from_torch(torch.rand(n, generator=generator)),
            },
        )
        for tokens, n in zip(inputs, lengths, strict=True)
    ]
    return ForwardBackwardInput(data, "cross_entropy")


def plain_logprobs(model: PreTrainedModel, tokens: ModelInput, more: list[int] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(**as_the_model_takes(tokens, more), use_cache=False).logits[0].log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_no_one_and_three_images_in_one_pass_have_the_models_own_logprobs(
    family: Callable[[], PreTrainedModel],
) -> None:
    shop = Workshop(family(), base=wrap_with_eyes)
    shop.add("run", AdapterSpec(rank=2)).weights.zero_()
    shop.pool.get("run").refresh()
    request = data_of(EACH, shop.base)
    found = logprobs(shop.engine.forward_backward([job("run", request, backward=False)])[0])
    model = family()
    for tokens, datum, ours in zip(EACH, request.data, found, strict=True):
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()[:, None]
        expected = plain_logprobs(model, tokens).gather(1, targets)[:, 0]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_micro_batch_with_images_has_pefts_gradients(family: Callable[[], PreTrainedModel]) -> None:
    shop = Workshop(family(), base=wrap_with_eyes)
    specs = [AdapterSpec(rank=4, seed=1), AdapterSpec(rank=2, seed=2, train_mlp=False)]
    adapters = [shop.add(str(i), spec) for i, spec in enumerate(specs)]
    requests = [data_of(EACH, shop.base, 1), data_of([THREE, NONE], shop.base, 2)]
    outcomes = shop.engine.forward_backward([job(str(i), request) for i, request in enumerate(requests)])
    for outcome, adapter, request in zip(outcomes, adapters, requests, strict=True):
        reference = PeftRun(family(), adapter)
        expected, _ = reference.forward_backward(request)
        for found, logprob in zip(logprobs(outcome), expected, strict=True):
            assert_close(found, logprob)
        assert_close(adapter.grad, reference.grad())


# Sampling ------------------------------------------------------------------------------------------------------------


def request(tokens: ModelInput, base: BaseModel, samples: int = 1, **options: Any) -> SampleInput:
    params = SamplingParams(max_tokens=options.pop("max_tokens", 6), stop=[], **options)
    return SampleInput(counted(tokens, base).tokens, samples, params, include_prompt_logprobs=True)


def assert_is_the_models_own(model: PreTrainedModel, tokens: ModelInput, response: SampleResponse) -> None:
    """An image's tokens have no logprob; those of the rest, and of what was sampled after it, are the model's."""
    assert response.prompt_logprobs is not None
    ids = as_the_model_takes(tokens)["input_ids"][0].tolist()
    is_text = [place > 0 and token != IMAGE for place, token in enumerate(ids)]
    assert [logprob is not None for logprob in response.prompt_logprobs] == is_text
    for sequence in response.sequences:
        # transformers takes a token for an image's, if it is sampled, too.
        n = (*sequence.tokens, IMAGE).index(IMAGE)
        every = ids + sequence.tokens[:n]
        expected = plain_logprobs(model, tokens, every[len(ids) :])[:-1].gather(1, torch.tensor(every[1:])[:, None])
        found = [*response.prompt_logprobs[1:], *sequence.logprobs[:n]]
        known = [i for i, logprob in enumerate(found) if logprob is not None]
        ours = torch.tensor([found[i] for i in known])
        torch.testing.assert_close(ours, expected[known, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefill_chunk", [5, 64])
def test_prompts_with_images_and_what_is_sampled_after_them_have_the_models_own_logprobs(
    family: Callable[[], PreTrainedModel], prefill_chunk: int
) -> None:
    """Also where a chunk of a prompt begins or ends inside an image, beside rows that decode already."""
    base = wrap_with_eyes(family())
    decoder = new_decoder(base, 8, prefill_chunk)
    for i, tokens in enumerate(EACH):
        decoder.add(i, request(tokens, base, 1 + i % 2, max_tokens=4 + 3 * i), None, i)
    results = run(decoder)
    model = family()
    for i, tokens in enumerate(EACH):
        assert_is_the_models_own(model, tokens, results[i])


def test_what_is_sampled_after_images_is_what_generate_gives() -> None:
    base, model = wrap_with_eyes(tiny_qwen3_vl()), tiny_qwen3_vl()
    decoder = new_decoder(base)
    decoder.add("greedy", request(THREE, base, max_tokens=12, temperature=0), None, 0)
    wanted = as_the_model_takes(THREE)
    generated = model.generate(**wanted, max_new_tokens=12, do_sample=False, pad_token_id=0)  # pyright: ignore
    assert run(decoder)["greedy"].sequences[0].tokens == generated[0, wanted["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_gives_what_was_sampled_after_images_the_samplers_logprobs(
    family: Callable[[], PreTrainedModel],
) -> None:
    shop = Workshop(family(), base=wrap_with_eyes)
    adapter = shop.add("run", AdapterSpec(rank=4, seed=3))
    decoder = new_decoder(shop.base)
    decoder.add("sampled", request(THREE, shop.base, 3), adapter, 0)
    for sequence in run(decoder)["sampled"].sequences:
        n = counted(THREE, shop.base).tokens.length
        row = ModelInput([*THREE.chunks, EncodedTextChunk(sequence.tokens[:-1])])
        targets = TensorData([0] * (n - 1) + sequence.tokens)
        forward = ForwardBackwardInput([Datum(row, {"target_tokens": targets})], "cross_entropy")
        trained = logprobs(shop.engine.forward_backward([job("run", forward, backward=False)])[0])[0][n - 1 :]
        torch.testing.assert_close(torch.tensor(sequence.logprobs), trained, rtol=0, atol=1e-4)


def test_an_equal_image_is_found_computed_and_another_of_its_size_is_not() -> None:
    base = wrap_with_eyes(tiny_qwen3_vl())
    decoder = new_decoder(base)
    same, other = (between([1, 2, 3], chunk(48, 48, seed), [4, 5, 6, 7]) for seed in (1, 2))
    asked = {"first": same, "again": same, "other": other}
    found: dict[Any, tuple[SampleResponse, int]] = {}
    for key, tokens in asked.items():
        params = SamplingParams(max_tokens=20, stop=[])
        wanted = SampleInput(counted(tokens, base).tokens, 1, params)
        decoder.add(key, wanted, None, 7, "base")
        while decoder.active:
            found |= {key: (result, usage.cached_tokens) for key, result, usage in decoder.step()}
    assert {key: cached for key, (_, cached) in found.items()} == {"first": 0, "again": 32, "other": 0}
    assert tokens_of(found["again"][0]) == tokens_of(found["first"][0])
    alone = new_decoder(base)
    alone.add("other", request(other, base, max_tokens=20), None, 7)
    assert tokens_of(found["other"][0]) == tokens_of(run(alone)["other"])


def test_a_sequence_that_gives_way_goes_on_after_its_images_as_if_it_had_not() -> None:
    base, model = wrap_with_eyes(tiny_qwen3_vl()), tiny_qwen3_vl()
    decoder = new_decoder(base, blocks=9)
    for i in range(3):
        decoder.add(i, request(THREE, base, max_tokens=40), None, i)
    results = run(decoder)
    assert decoder.lineup.preemptions > 0
    for i in range(3):
        assert_is_the_models_own(model, THREE, results[i])


# What is kept, and where images are ----------------------------------------------------------------------------------


def test_an_image_goes_through_the_tower_once_as_long_as_it_is_kept() -> None:
    base = wrap_with_eyes(tiny_qwen3_vl(), cache_bytes=6000)
    eyes = base.eyes
    assert eyes is not None
    a, b, c = (eyes.open("a", chunk(32, 32, seed))[0] for seed in range(3))
    first = eyes.see(a)
    assert first.nbytes == 16 * 32 * 4 * 3
    assert eyes.see(a) is first
    assert eyes.seen == 1
    for each in (b, c, a):
        eyes.see(each)
    assert eyes.seen == 4
    assert torch.equal(eyes.see(a).embeddings, first.embeddings)


@given(data=st.data())
def test_positions_are_the_models_own(data: st.DataObject) -> None:
    """Text lies between images, for the model's own function takes neighbours for one image."""
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=3))
    gaps = [data.draw(st.integers(1, 4)) for _ in range(len(sizes) + 1)]
    placed: list[Placed] = []
    kinds: list[int] = []
    for gap, (height, width) in zip(gaps, sizes, strict=False):
        kinds += [0] * gap
        placed.append(Placed(len(kinds), height, width, NOWHERE))
        kinds += [1] * (height * width)
    kinds += [0] * gaps[-1]
    found = lay_out_positions(placed, len(kinds))
    grids = torch.tensor([(1, 2 * h, 2 * w) for h, w in sizes]) if sizes else None
    positions, delta = tiny_eyes().model.get_rope_index(torch.zeros(1, len(kinds)), torch.tensor([kinds]), grids)
    assert np.array_equal(found.positions, positions[:, 0])
    assert found.offset == delta.item()


@given(cuts=st.lists(st.integers(0, 30), max_size=4))
def test_positions_of_parts_are_parts_of_the_positions(cuts: list[int]) -> None:
    images = lay_out_positions([Placed(3, 2, 3, NOWHERE)], 14)
    bounds = [0, *sorted(cuts), 30]
    parts = [Stretch(start, end, images) for start, end in pairwise(bounds)]
    whole = positions_of([Stretch(0, 30, images)])
    assert np.array_equal(
        np.concatenate([np.broadcast_to(positions_of([p]), (3, p.end - p.start)) for p in parts], 1), whole
    )
    assert whole[:, -1].tolist() == [29 + images.offset] * 3


NOWHERE = Picture("", b"", "png", Digest(b""), Structure(0, 0, ()))


@functools.cache
def tiny_eyes() -> PreTrainedModel:
    return tiny_qwen3_vl()


def test_neighbours_without_text_between_them_are_two_images() -> None:
    """Which transformers takes for one, and so fails."""
    base = wrap_with_eyes(tiny_qwen3_vl())
    found = read_in(base, ModelInput([chunk(8, 16, 1), chunk(24, 8, 2)]))
    assert (images := found.images) is not None
    assert len(found.ids) == 5
    assert images.positions.tolist() == [[0, 0, 2, 2, 2], [0, 1, 2, 2, 2], [0, 0, 2, 3, 4]]
    assert images.offset == 0


def test_ids_of_images_are_below_zero_and_their_own() -> None:
    base = wrap_with_eyes(tiny_qwen3_vl())
    ids, again, other = (read_in(base, ModelInput([chunk(32, 32, seed)])).ids for seed in (1, 1, 2))
    assert max(ids + other) < 0
    assert ids == again
    assert not set(ids) & set(other)
