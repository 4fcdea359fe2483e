"""A base in 4 bits, against PEFT over the same one."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lorry.actors.model import nf4
from lorry.actors.model.base_model import load_base_model
from lorry.actors.model.loading import load_model
from lorry.actors.model.lora import experts_of, layers_of, quantise_experts
from lorry.actors.model.nf4 import is_quantised, nbytes_of, stacked
from lorry.actors.model.sizing import size_of
from lorry.actors.model.spec import AdapterSpec
from lorry.wire.errors import UnsupportedModelError
from lorry.wire.types import AdamParams

from .models import (
    tiny_deepseek_v3,
    tiny_gpt_oss,
    tiny_llama,
    tiny_qwen3,
    tiny_qwen3_moe,
    tiny_qwen3_vl,
    tiny_qwen3_vl_moe,
)
from .pictures import chunk, save_processor
from .quantised import write
from .reference import PeftRun
from .test_decoder import PROMPTS, assert_is_the_models_own, new_decoder, run
from .test_decoder import request as sampling
from .test_engine import SPECS, assert_mixed_equals_peft
from .test_quantised import FORMATS
from .workshop import Family, Workshop, assert_close, job, logprobs, request

LARGER: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
"""So that a weight has several blocks."""
FAMILIES: list[Callable[..., PreTrainedModel]] = [tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3]


def saved(model: PreTrainedModel, folder: Path) -> Family:
    """Loads it in 4 bits, its experts as they are."""
    model.save_pretrained(folder)
    return lambda: load_model(folder, "float32", quantize="nf4")


def with_rounded_experts(model: PreTrainedModel) -> PreTrainedModel:
    """As plain weights, what 4 bits leave of them."""
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            for leaf in ("gate_up_proj", "down_proj"):
                parameter = getattr(module, leaf)
                weights = parameter.mT if module.is_transposed else parameter
                rounded = torch.stack([stacked(weights.data)[i] for i in range(len(weights))])
                parameter.data = (rounded.mT if module.is_transposed else rounded).contiguous()
    return model


@pytest.mark.parametrize("family", [tiny_llama, tiny_qwen3])
def test_a_mixed_micro_batch_equals_peft_run_after_run(family: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    assert_mixed_equals_peft(saved(family(**LARGER), tmp_path), SPECS)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_trained_as_peft_would(family: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    load = saved(family(), tmp_path)
    shop = Workshop(load())
    quantise_experts(shop.base)
    adapter = shop.add("run", AdapterSpec(4, seed=1))
    reference = PeftRun(with_rounded_experts(load()), adapter)
    for seed in range(3):
        (outcome,) = shop.engine.forward_backward([job("run", request(seed))])
        expected, _ = reference.forward_backward(request(seed))
        for found, peft in zip(logprobs(outcome), expected, strict=True):
            assert_close(found, peft)
        assert_close(adapter.grad, reference.grad())
        shop.engine.optim_step([("run", AdamParams(learning_rate=1e-2))])
        reference.step(AdamParams(learning_rate=1e-2))


@pytest.mark.parametrize("family", [tiny_llama, *FAMILIES])
def test_it_is_sampled_as_it_is_trained(family: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    load = saved(family(), tmp_path)
    shop = Workshop(load())
    quantise_experts(shop.base)
    adapters = [None, shop.add("2", AdapterSpec(2, seed=2)), shop.add("8", AdapterSpec(8, seed=8))]
    decoder = new_decoder(shop.base, 8, 32)
    for i, prompt in enumerate(PROMPTS):
        decoder.add(i, sampling(prompt, 2, include_prompt_logprobs=True), adapters[i % 3], i)
    results = run(decoder)
    for i, prompt in enumerate(PROMPTS):
        adapter, bare = adapters[i % 3], with_rounded_experts(load())
        model = bare if adapter is None else cast("PreTrainedModel", PeftRun(bare, adapter).model)
        assert_is_the_models_own(model, prompt, results[i])


@pytest.mark.parametrize("family", [tiny_llama, tiny_gpt_oss])
def test_it_takes_an_eighth_of_float32(family: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """And a little for the factors of its blocks, which are 64 numbers, and of those, 256 of which have one."""
    shop = Workshop(saved(family(hidden_size=256, head_dim=64, intermediate_size=512), tmp_path)())
    quantise_experts(shop.base)
    head = shop.base.model.get_output_embeddings()
    layers = [layer for layer in layers_of(shop.base).values() if layer is not head]
    plain = sum(4 * layer.in_features * layer.out_features for layer in layers)
    assert sum(nbytes_of(layer.base) for layer in layers) < plain * 0.131
    for experts in experts_of(shop.base).values():
        for stack in experts.weights:
            assert stack.nbytes < 4 * torch.Size(stack.shape).numel() * 0.131
        assert experts.module.gate_up_proj.nbytes == experts.module.down_proj.nbytes == 0
    kept = sum(parameter.nbytes for parameter in shop.base.model.parameters() if parameter.is_floating_point())
    held = sum(nbytes_of(layer.base) for layer in layers) + sum(
        stack.nbytes for experts in experts_of(shop.base).values() for stack in experts.weights
    )
    expected = size_of(str(tmp_path)).weights_bytes(4, "nf4")
    assert kept + held == pytest.approx(expected, rel=0.01)


def test_its_weights_stay_readable_where_the_library_would_rewrite_them(tmp_path: Path) -> None:
    model = saved(tiny_llama(**LARGER), tmp_path)()
    four_bit = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(four_bit) == 2 * 7
    assert not any(module.support_avx512bf16_for_cpu for module in four_bit)


@pytest.mark.parametrize("family", [tiny_qwen3_vl, tiny_qwen3_vl_moe])
def test_what_sees_and_the_head_stay_as_they_are(family: Family, tmp_path: Path) -> None:
    family().save_pretrained(tmp_path)
    save_processor(tmp_path)
    four_bit, whole = (load_base_model(tmp_path, dtype="float32", quantize=how) for how in ("nf4", "none"))
    quantised = {name for name, m in four_bit.model.named_modules() if isinstance(m, nn.Linear) and is_quantised(m)}
    assert quantised
    assert not any("visual" in name or "lm_head" in name for name in quantised)
    seen = [
        base.eyes.see(base.eyes.open("image", chunk(32, 32))[0]).embeddings for base in (four_bit, whole) if base.eyes
    ]
    assert torch.equal(*seen)


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_it_computes_in_the_dtype_that_it_is_asked_for(dtype: str, tmp_path: Path) -> None:
    tiny_llama(**LARGER).bfloat16().save_pretrained(tmp_path)
    base = load_base_model(tmp_path, dtype=dtype, quantize="nf4")
    assert base.dtype == torch.bfloat16
    shop = Workshop(base.model)
    adapter = shop.add("run", AdapterSpec(4, seed=1))
    shop.engine.forward_backward([job("run", request(0))])
    assert adapter.grad.isfinite().all() and adapter.grad.any()
    assert all(layer.weight.dtype == torch.bfloat16 for layer in layers_of(shop.base).values())


def test_what_is_quantised_already_is_refused(tmp_path: Path) -> None:
    family, quantise, config = FORMATS[0].values
    write(cast(Any, family)(), tmp_path / "model", cast(Any, quantise), cast(Any, config))
    with pytest.raises(UnsupportedModelError, match="quantised already: serve it without --quantize"):
        load_model(tmp_path / "model", "float32", quantize="nf4")


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = saved(tiny_llama(), tmp_path)
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with pytest.raises(UnsupportedModelError, match="pip install bitsandbytes"):
        load()
