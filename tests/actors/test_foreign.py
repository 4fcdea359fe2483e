"""Adapters that PEFT trained: taken in exactly, or refused by name."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lorry.actors.adapters.checkpoints import load_state, save_sampler_weights, save_without_moments
from lorry.actors.adapters.foreign import read_foreign, said_base
from lorry.actors.adapters.residents import spec_of
from lorry.actors.model.spec import AdapterSpec
from lorry.wire.errors import CheckpointError
from lorry.wire.types import AdamParams, ExpertLora, FileLayout

from .models import tiny_deepseek_v3, tiny_gpt_oss, tiny_llama, tiny_qwen3, tiny_qwen3_moe
from .reference import PeftRun
from .test_checkpoints import assert_peft_agrees, trained
from .workshop import Family, Workshop, assert_agrees, job, request


def by_peft(folder: Path, family: Family = tiny_llama, **settings: Any) -> PeftModel:
    """An adapter of PEFT's own, in FOLDER. B is random, so that it does something."""
    torch.manual_seed(0)
    model = cast(PeftModel, get_peft_model(family(), LoraConfig(task_type="CAUSAL_LM", **settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(str(folder))
    return model


def taken_in(shop: Workshop, folder: Path) -> None:
    """As a run "run", by way of a checkpoint's folder."""
    foreign = read_foreign(folder, shop.targets)
    save_without_moments(foreign.adapter, shop.targets, folder.parent / "checkpoint", "tiny/model")
    adapter = shop.targets.new_adapter(spec_of(foreign.lora), shop.base.device)
    load_state(adapter, folder.parent / "checkpoint", optimizer=True)
    assert adapter.step == 0
    shop.pool.add("run", adapter)


SUBSETS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["down_proj"]},
    {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"r": 2, "target_modules": r".*layers\.(0\.self_attn\.[qk]|1\.mlp\.up)_proj"},
    {"r": 2, "target_modules": ["lm_head", "o_proj"]},
    {"r": 2, "init_lora_weights": "gaussian", "lora_dropout": 0.1, "target_modules": ["gate_proj"]},
]


@pytest.mark.parametrize("settings", SUBSETS)
def test_an_adapter_of_pefts_computes_what_it_did(settings: dict[str, Any], tmp_path: Path) -> None:
    model = by_peft(tmp_path / "theirs", **settings)
    shop = Workshop(tiny_llama())
    taken_in(shop, tmp_path / "theirs")
    assert_agrees(model.eval(), shop)


@pytest.mark.parametrize("settings", SUBSETS)
def test_it_is_trained_on_as_peft_would_and_leaves_as_it_is(settings: dict[str, Any], tmp_path: Path) -> None:
    by_peft(tmp_path / "theirs", **settings)
    shop = Workshop(tiny_llama())
    taken_in(shop, tmp_path / "theirs")
    reference = PeftRun(tiny_llama(), shop.pool.get("run"))
    for seed in range(3):
        shop.engine.forward_backward([job("run", request(seed))])
        reference.forward_backward(request(seed))
        shop.engine.optim_step([("run", AdamParams(learning_rate=1e-2))])
        reference.step(AdamParams(learning_rate=1e-2))
    assert_agrees(reference.model, shop)
    save_sampler_weights(shop.pool.get("run"), shop.targets, tmp_path / "ours", "tiny/model")
    assert_peft_agrees(shop, tiny_llama, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == {name for name in theirs if ".lora_" in name}


@pytest.mark.parametrize("layout", ["peft", "tinker"])
@pytest.mark.parametrize("kind", ["shared", "independent"])
@pytest.mark.parametrize("family", [tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3])
def test_experts_are_taken_in_from_either_layout(
    family: Family, kind: ExpertLora, layout: FileLayout, tmp_path: Path
) -> None:
    theirs = Workshop(family())
    adapter = trained(theirs, AdapterSpec(3, alpha=7.0, seed=1, expert_lora=kind))
    save_sampler_weights(adapter, replace(theirs.targets, layout=layout), tmp_path / "theirs", "tiny/model")
    shop = Workshop(family())
    taken_in(shop, tmp_path / "theirs")
    assert shop.pool.get("run").spec.expert_lora == kind
    assert torch.equal(shop.pool.get("run").weights, adapter.weights)


def test_who_trained_it_says_on_what(tmp_path: Path) -> None:
    by_peft(tmp_path / "theirs", r=4, target_modules=["q_proj"])
    with_config(base_model_name_or_path="tiny/llama")(tmp_path / "theirs")
    assert said_base(tmp_path / "theirs") == "tiny/llama"


def test_what_was_trained_in_bfloat16_is_taken_in_exactly(tmp_path: Path) -> None:
    by_peft(tmp_path / "theirs", r=4, target_modules=["q_proj"])
    file = tmp_path / "theirs/adapter_model.safetensors"
    halved = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halved, file)
    adapter = read_foreign(tmp_path / "theirs", Workshop(tiny_llama()).targets).adapter
    a, _ = adapter.module_weights()["model.layers.0.self_attn.q_proj"]
    assert torch.equal(a, halved["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].float())


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return rewrite


Q = "base_model.model.model.layers.0.self_attn.q_proj"


class Explodes:
    def __reduce__(self) -> Any:
        return pytest.fail, ("it was unpickled",)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Explodes()))


def pickled_under_its_name(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Explodes()))


REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (with_config(use_dora=True), "use_dora True"),
    (with_config(rank_pattern={"q_proj": 8}), "rank_pattern {'q_proj': 8}"),
    (with_config(alpha_pattern={"q_proj": 8}), "alpha_pattern {'q_proj': 8}"),
    (with_config(modules_to_save=["lm_head"]), r"modules_to_save \['lm_head'\]"),
    (with_config(bias="all"), "bias 'all'"),
    (with_config(lora_bias=True), "lora_bias True"),
    (with_config(fan_in_fan_out=True), "fan_in_fan_out True"),
    (with_config(trainable_token_indices=[1]), r"trainable_token_indices \[1\]"),
    (with_config(alora_invocation_tokens=[1]), r"alora_invocation_tokens \[1\]"),
    (with_config(layer_replication=[[0, 2]]), "layer_replication"),
    (with_config(use_what_comes_next=True), "use_what_comes_next True"),
    (with_config(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4'"),
    (with_config(init_lora_weights="olora"), "init_lora_weights 'olora'"),
    (with_config(peft_type="IA3"), "peft_type 'IA3'"),
    (with_config(r=None), "r None"),
    (with_config(r=True), "r True"),
    (with_config(r=8), "of a|has a"),
    (with_config(lora_alpha="much"), "lora_alpha 'much'"),
    (with_config(lora_alpha=0), "lora_alpha 0"),
    (pickled, "adapter_model.bin is a pickle"),
    (pickled_under_its_name, "adapter_model.safetensors cannot be read"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    (lambda folder: (folder / "adapter_config.json").write_text("[]"), "adapter_config.json holds no JSON object"),
    (with_tensors(lambda t: t.pop(f"{Q}.lora_A.weight")), f"of {Q} there is only lora_B"),
    (with_tensors(lambda t: t.update({"base_model.model.score.weight": torch.ones(2)})), "score.weight"),
    (with_tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(2)})), "lora_magnitude_vector"),
    (with_tensors(lambda t: t[f"{Q}.lora_B.weight"].fill_(torch.nan)), "not finite"),
    (with_tensors(lambda t: t.clear()), "no factors at all"),
]


@pytest.mark.parametrize(("spoil", "words"), REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(
    spoil: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    by_peft(tmp_path / "theirs", r=4, target_modules=["q_proj", "v_proj"])
    targets = Workshop(tiny_llama()).targets
    spoil(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=words):
        read_foreign(tmp_path / "theirs", targets)


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path: Path) -> None:
    by_peft(tmp_path / "theirs", r=4, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"has a \[4, 32\] model.layers.0.self_attn.q_proj.lora_A"):
        read_foreign(tmp_path / "theirs", Workshop(tiny_llama(hidden_size=48)).targets)
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.q_proj.lora_A.weight, which no layer"):
        read_foreign(tmp_path / "theirs", Workshop(tiny_llama(num_hidden_layers=1)).targets)


def test_trained_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    by_peft(tmp_path / "theirs", r=4, target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"embed_tokens.lora_embedding_A"):
        read_foreign(tmp_path / "theirs", Workshop(tiny_qwen3()).targets)
