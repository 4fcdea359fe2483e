"""Adapters on routed experts, against PEFT with a factor for each expert."""

from collections import Counter
from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lorry.actors.model.in_flight import Segment
from lorry.actors.model.lora import experts_of
from lorry.actors.model.routing import route
from lorry.actors.model.spec import AdapterSpec
from lorry.wire.types import ExpertLora

from .models import tiny_deepseek_v3, tiny_gpt_oss, tiny_qwen3_moe, tiny_qwen3_vl_moe
from .reference import PeftRun
from .test_decoder import PROMPTS, assert_is_the_models_own, new_decoder, run
from .test_decoder import request as sampling
from .test_engine import SPECS, assert_mixed_equals_peft
from .workshop import Family, Workshop, assert_close, job, logprobs, request, succeeded

FAMILIES = [tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3, tiny_qwen3_vl_moe]
LAYOUTS: list[ExpertLora] = ["shared", "independent"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_micro_batch_over_experts_equals_peft_run_after_run(family: Family, layout: ExpertLora) -> None:
    assert_mixed_equals_peft(family, [replace(spec, expert_lora=layout) for spec in SPECS])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_on_experts_samples_from_its_own_model(family: Family) -> None:
    shop = Workshop(family())
    layouts: list[ExpertLora] = ["shared", "independent", "shared"]
    specs = [AdapterSpec(rank, seed=rank, expert_lora=layout) for rank, layout in zip((2, 4, 8), layouts, strict=True)]
    adapters = [None, *(shop.add(str(i), spec) for i, spec in enumerate(specs))]
    decoder = new_decoder(shop.base, 8, 32)
    for i, prompt in enumerate(PROMPTS):
        decoder.add(i, sampling(prompt, 2, include_prompt_logprobs=True), adapters[i % 4], i)
    results = run(decoder)
    for i, prompt in enumerate(PROMPTS):
        adapter = adapters[i % 4]
        model = family() if adapter is None else cast("PreTrainedModel", PeftRun(family(), adapter).model)
        assert_is_the_models_own(model, prompt, results[i])


@pytest.mark.parametrize("family", FAMILIES)
def test_who_shares_a_pass_over_experts_changes_nobodys_results(family: Family) -> None:
    """Eight runs, dense and mixed targets and ranks together, in three slots; each against itself alone."""
    specs = [replace(spec, seed=i, expert_lora=LAYOUTS[i % 2]) for i, spec in enumerate([*SPECS, *SPECS[:2]])]
    together = Workshop(family(), slots=3)
    batch = [request(i, (5, 9), "importance_sampling") for i in range(len(specs))]
    for i, spec in enumerate(specs):
        together.add(str(i), spec)
    outcomes = together.engine.forward_backward([job(str(i), data) for i, data in enumerate(batch)])
    for i, (spec, data, outcome) in enumerate(zip(specs, batch, outcomes, strict=True)):
        shop = Workshop(family())
        adapter = shop.add("alone", spec)
        (alone,) = shop.engine.forward_backward([job("alone", data)])
        for found, expected in zip(logprobs(outcome), logprobs(alone), strict=True):
            assert_close(found, expected)
        assert_close(together.pool.get(str(i)).grad, adapter.grad)


def test_a_pass_pauses_between_the_products_of_experts_and_a_decode_step_never_does() -> None:
    shop, pauses = Workshop(tiny_qwen3_moe()), Counter[str]()
    adapter = shop.add("run", AdapterSpec(4, train_attn=False, train_unembed=False))
    shop.base.in_flight.on_pause = lambda: pauses.update(["decode" if shop.base.in_flight.linears else "pass"])
    shop.engine.forward_backward([job("run", request(0))])
    attention, experts, engine = 2 * 4 * 2, 2 * 2 * 2, 1  # layers, products, forward and back
    assert pauses["pass"] >= attention + experts + engine
    decoder = new_decoder(shop.base)
    decoder.add("sample", sampling(PROMPTS[0]), adapter, 0)
    run(decoder)
    assert pauses["decode"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", [tiny_gpt_oss, tiny_deepseek_v3])
def test_in_bfloat16_the_gradient_of_experts_is_that_of_float32(family: Family, layout: ExpertLora) -> None:
    """Of the same weights; what is rounded on the way sends no token to another expert here."""
    grads: list[torch.Tensor] = []
    for model in (family().bfloat16(), family().bfloat16().float()):
        shop = Workshop(model)
        adapter = shop.add("run", AdapterSpec(4, seed=1, expert_lora=layout))
        (outcome,) = shop.engine.forward_backward([job("run", request(0))])
        succeeded(outcome)
        grads.append(adapter.grad)
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99


def test_a_token_of_no_segment_sees_the_bare_experts() -> None:
    shop = Workshop(tiny_gpt_oss())
    shop.add("run", AdapterSpec(4))
    (experts, *_) = experts_of(shop.base).values()
    generator = torch.Generator().manual_seed(0)
    hidden, counted = torch.randn(6, 32, generator=generator), torch.rand(6, 2, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(6)])
    with torch.no_grad():
        bare = experts.compute(hidden, chosen, counted)
        shop.base.in_flight.segments = [Segment(shop.pool.get("run"), 2, 4)]
        y = experts.compute(hidden, chosen, counted)
    assert torch.equal(y[:2], bare[:2])
    assert torch.equal(y[4:], bare[4:])
    assert not torch.isclose(y[2:4], bare[2:4]).all()


@given(st.data())
def test_every_pair_is_routed_once_and_to_its_own(data: st.DataObject) -> None:
    experts, choices = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 2))
    chosen = data.draw(st.lists(st.permutations(range(experts)).map(lambda p: p[:choices]), min_size=1, max_size=12))
    bounds = sorted(data.draw(st.sets(st.integers(0, len(chosen)), max_size=6)))
    segments = list(zip(bounds[::2], bounds[1::2], strict=False))
    routing = route(torch.tensor(chosen), experts, segments)
    pairs = list(zip(routing.tokens.tolist(), routing.experts.tolist(), strict=True))
    assert sorted(pairs) == sorted((token, expert) for token, some in enumerate(chosen) for expert in some)
    assert routing.counts == [sum(e == expert for _, e in pairs) for expert in range(experts)]
    assert [e for _, e in pairs] == sorted(e for _, e in pairs)
    assert [[pairs[place] for place in places] for places in routing.places.tolist()] == [
        [(token, expert) for expert in some] for token, some in enumerate(chosen)
    ]
    assert [sum(stretch.pairs for stretch in own) for own in routing.stretches] == routing.counts
    owners = [next((i for i, (start, end) in enumerate(segments) if start <= t < end), None) for t, _ in pairs]
    expected = list(zip((e for _, e in pairs), owners, strict=True))
    found = [(expert, s.segment) for expert, own in enumerate(routing.stretches) for s in own for _ in range(s.pairs)]
    assert found == expected
