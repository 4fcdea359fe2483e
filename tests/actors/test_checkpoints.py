import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lorry.actors.adapters import checkpoints
from lorry.actors.adapters.checkpoints import (
    load_sampler_weights,
    load_state,
    save_sampler_weights,
    save_state,
)
from lorry.actors.adapters.folders import seal, written_aside
from lorry.actors.adapters.layouts import written
from lorry.actors.adapters.snapshots import restore_state
from lorry.actors.adapters.tensors import write_tensors
from lorry.actors.model.adapter import Adapter
from lorry.actors.model.spec import AdapterSpec
from lorry.wire.errors import CheckpointError
from lorry.wire.types import AdamParams, ExpertLora, FileLayout

from .models import (
    tiny_deepseek_v3,
    tiny_gpt_oss,
    tiny_llama,
    tiny_qwen3,
    tiny_qwen3_moe,
    tiny_qwen3_vl,
    tiny_qwen3_vl_moe,
)
from .workshop import Family, Workshop, assert_agrees, job, request

EXPERTS = "base_model.model.model.layers.1.mlp.experts"
SPECS = [AdapterSpec(4, seed=1), AdapterSpec(3, seed=2, train_mlp=False), AdapterSpec(2, seed=3, train_unembed=False)]


def trained(shop: Workshop, spec: AdapterSpec, *, key: str = "run", pending: bool = False) -> Adapter:
    adapter = shop.add(key, spec)
    shop.engine.forward_backward([job(key, request(0))])
    shop.engine.optim_step([(key, AdamParams(learning_rate=1e-2))])
    if pending:
        shop.engine.forward_backward([job(key, request(1))])
    return adapter


def assert_peft_agrees(shop: Workshop, family: Family, folder: Path) -> None:
    """Without a warning of keys that are missing or too many."""
    assert_agrees(PeftModel.from_pretrained(family(), str(folder)), shop)


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        *((family, spec) for family in (tiny_qwen3, tiny_llama) for spec in SPECS),
        (tiny_qwen3_moe, SPECS[1]),
        (tiny_qwen3_vl, SPECS[0]),
    ],
)
def test_peft_loads_a_saved_sampler_and_gives_the_same_logprobs(
    family: Family, spec: AdapterSpec, tmp_path: Path
) -> None:
    shop = Workshop(family())
    adapter = trained(shop, spec)
    save_sampler_weights(adapter, shop.targets, tmp_path / "weights", "tiny/model")
    assert_peft_agrees(shop, family, tmp_path / "weights")
    config = json.loads((tmp_path / "weights" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (spec.rank, 32.0, "tiny/model")


@pytest.mark.parametrize("pending", [False, True], ids=["nothing pending", "gradients pending"])
def test_a_run_goes_on_from_its_saved_state_as_if_never_interrupted(pending: bool, tmp_path: Path) -> None:
    shop, other = Workshop(tiny_qwen3()), Workshop(tiny_qwen3())
    adapter = trained(shop, SPECS[0], pending=pending)
    save_state(adapter, shop.targets, tmp_path / "state", "tiny/model")
    resumed = other.add("run", AdapterSpec(4, seed=99))
    restore_state(resumed, tmp_path / "state")
    assert (resumed.step, resumed.pending) == (1, pending)
    assert torch.equal(resumed.grad, adapter.grad)
    for each in (shop, other):
        each.engine.forward_backward([job("run", request(3))])
        each.engine.optim_step([("run", AdamParams(learning_rate=1e-2))])
    assert torch.equal(resumed.weights, adapter.weights)
    assert torch.equal(resumed.exp_avg_sq, adapter.exp_avg_sq)


@pytest.mark.parametrize("optimizer", [False, True], ids=["weights alone", "with the optimizer"])
def test_after_a_checkpoint_is_loaded_no_gradient_is_pending_though_one_was_saved(
    optimizer: bool, tmp_path: Path
) -> None:
    shop = Workshop(tiny_qwen3())
    adapter = trained(shop, SPECS[0], pending=True)
    saved = [vector.clone() for vector in (adapter.weights, adapter.exp_avg, adapter.exp_avg_sq)]
    save_state(adapter, shop.targets, tmp_path / "state", "tiny/model")
    other = trained(shop, AdapterSpec(4, seed=99), key="other", pending=True)
    load_state(other, tmp_path / "state", optimizer=optimizer)
    assert (other.step, other.pending) == (int(optimizer), False)
    assert other.grad.abs().max() == 0
    assert torch.equal(other.weights, saved[0])
    assert torch.equal(other.exp_avg, saved[1] if optimizer else torch.zeros_like(saved[1]))
    assert torch.equal(other.exp_avg_sq, saved[2] if optimizer else torch.zeros_like(saved[2]))


def test_weights_can_be_loaded_without_the_optimizer(tmp_path: Path) -> None:
    shop = Workshop(tiny_qwen3())
    adapter = trained(shop, SPECS[0], pending=True)
    saved = adapter.weights.clone()
    save_state(adapter, shop.targets, tmp_path / "state", "tiny/model")
    shop.engine.optim_step([("run", AdamParams(learning_rate=1e-2))])
    shop.engine.forward_backward([job("run", request(3))])
    load_state(adapter, tmp_path / "state", optimizer=False)
    assert torch.equal(adapter.weights, saved)
    assert (adapter.step, adapter.pending) == (0, False)
    assert max(v.abs().max().item() for v in (adapter.grad, adapter.exp_avg, adapter.exp_avg_sq)) == 0


@pytest.mark.parametrize("save", [save_state, save_sampler_weights])
@pytest.mark.parametrize("spec", SPECS)
def test_a_sampler_is_loaded_from_either_kind_of_folder(save: Any, spec: AdapterSpec, tmp_path: Path) -> None:
    shop = Workshop(tiny_qwen3())
    adapter = trained(shop, spec)
    save(adapter, shop.targets, tmp_path / "saved", "tiny/model")
    sampler = load_sampler_weights(shop.targets, tmp_path / "saved", "cpu")
    assert torch.equal(sampler.weights, adapter.weights)
    assert sampler.targets == adapter.targets
    assert sampler.spec.scale == adapter.spec.scale
    assert sampler.grad.numel() == 0


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(name: str, damage: str, tmp_path: Path) -> None:
    shop = Workshop(tiny_qwen3())
    adapter = trained(shop, SPECS[0])
    save_state(adapter, shop.targets, tmp_path / "state", "tiny/model")
    path = tmp_path / "state" / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[-3] ^= 0x41
        path.write_bytes(content if damage == "flip" else content[:-3])
    adapter.weights.fill_(7.0)
    expected = r"\.(safetensors|json)" if name == "checksums.json" else name
    with pytest.raises(CheckpointError, match=expected):
        load_state(adapter, tmp_path / "state", optimizer=True)
    assert adapter.weights.min() == 7.0


@pytest.mark.parametrize("spec", [AdapterSpec(5), AdapterSpec(4, train_mlp=False)], ids=["rank", "modules"])
def test_a_state_of_another_shape_is_refused(spec: AdapterSpec, tmp_path: Path) -> None:
    shop = Workshop(tiny_qwen3())
    save_state(trained(shop, SPECS[0]), shop.targets, tmp_path / "state", "tiny/model")
    other = shop.add("other", spec)
    with pytest.raises(CheckpointError, match="adapter_model"):
        load_state(other, tmp_path / "state", optimizer=True)


def test_sampler_weights_have_no_optimizer_to_load(tmp_path: Path) -> None:
    shop = Workshop(tiny_qwen3())
    adapter = trained(shop, SPECS[0])
    save_sampler_weights(adapter, shop.targets, tmp_path / "weights", "tiny/model")
    load_state(adapter, tmp_path / "weights", optimizer=False)
    with pytest.raises(CheckpointError, match="optimizer"):
        load_state(adapter, tmp_path / "weights", optimizer=True)


def test_a_failed_save_leaves_the_former_folder_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Workshop(tiny_qwen3())
    adapter = trained(shop, SPECS[0])
    save_state(adapter, shop.targets, tmp_path / "state", "tiny/model")
    former = load_file(tmp_path / "state" / "adapter_model.safetensors")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "seal", full)
    adapter.weights.zero_()
    with pytest.raises(OSError, match="space"):
        save_state(adapter, shop.targets, tmp_path / "state", "tiny/model")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    found = load_file(tmp_path / "state" / "adapter_model.safetensors")
    assert all(torch.equal(found[key], former[key]) for key in former)


def test_saving_again_replaces_the_folder_and_tells_its_size(tmp_path: Path) -> None:
    shop = Workshop(tiny_qwen3())
    adapter = trained(shop, SPECS[0])
    first = save_state(adapter, shop.targets, tmp_path / "state", "tiny/model")
    again = save_state(adapter, shop.targets, tmp_path / "state", "tiny/model")
    shop.engine.forward_backward([job("run", request(3))])
    changed = save_state(adapter, shop.targets, tmp_path / "state", "tiny/model")
    assert again == first
    assert changed.sha256 != first.sha256
    assert changed.size_bytes == sum(path.stat().st_size for path in (tmp_path / "state").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


# PEFT gives experts that are modules in the file twice the rank, by a pattern that it seeks among modules alone.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("layout", ["shared", "independent"])
@pytest.mark.parametrize("family", [tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3, tiny_qwen3_vl_moe])
def test_peft_loads_an_adapter_on_experts_and_gives_the_same_logprobs(
    family: Family, layout: ExpertLora, tmp_path: Path
) -> None:
    shop = Workshop(family())
    adapter = trained(shop, AdapterSpec(3, seed=1, expert_lora=layout))
    save_sampler_weights(adapter, shop.targets, tmp_path / "weights", "tiny/model")
    assert_peft_agrees(shop, family, tmp_path / "weights")


@pytest.mark.parametrize("layout", ["peft", "tinker"])
@pytest.mark.parametrize("experts", ["shared", "independent"])
@pytest.mark.parametrize("family", [tiny_qwen3_moe, tiny_gpt_oss, tiny_qwen3_vl_moe])
def test_an_adapter_on_experts_comes_back_from_either_layout(
    family: Family, experts: ExpertLora, layout: FileLayout, tmp_path: Path
) -> None:
    shop = Workshop(family())
    targets = replace(shop.targets, layout=layout)
    adapter = trained(shop, AdapterSpec(3, seed=1, expert_lora=experts), pending=True)
    save_state(adapter, targets, tmp_path / "state", "tiny/model")
    again = shop.add("again", AdapterSpec(3, seed=9, expert_lora=experts))
    load_state(again, tmp_path / "state", optimizer=True)
    assert torch.equal(again.weights, adapter.weights)
    assert torch.equal(again.exp_avg_sq, adapter.exp_avg_sq)
    sampler = load_sampler_weights(shop.targets, tmp_path / "state", "cpu")
    assert sampler.spec.expert_lora == experts
    assert torch.equal(sampler.weights, adapter.weights)


def test_the_hosted_services_layout_has_its_keys_and_shapes(tmp_path: Path) -> None:
    """As its downloads have them: w1 and w3 with one A, w2 with one B, and the head by a name of its own."""
    shop = Workshop(tiny_gpt_oss())
    adapter = trained(shop, AdapterSpec(3))
    save_sampler_weights(adapter, replace(shop.targets, layout="tinker"), tmp_path / "weights", "tiny/model")
    tensors = load_file(tmp_path / "weights" / "adapter_model.safetensors")
    experts = "base_model.model.model.layers.1.mlp.experts"
    shapes = {key.removeprefix(f"{experts}."): list(t.shape) for key, t in tensors.items() if experts in key}
    assert shapes == {
        "w1.lora_A.weight": [1, 3, 32],
        "w1.lora_B.weight": [4, 48, 3],
        "w3.lora_A.weight": [1, 3, 32],
        "w3.lora_B.weight": [4, 48, 3],
        "w2.lora_A.weight": [4, 3, 48],
        "w2.lora_B.weight": [1, 32, 3],
    }
    assert torch.equal(tensors[f"{experts}.w1.lora_A.weight"], tensors[f"{experts}.w3.lora_A.weight"])
    _, b = adapter.module_weights()["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(tensors[f"{experts}.w3.lora_B.weight"], b[..., 1::2].mT)  # gate and up alternate in GPT-OSS
    assert "base_model.model.model.unembed_tokens.lora_A.weight" in tensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{EXPERTS}.0.up_proj.lora_B.weight"), "there is only lora_A"),
        (
            lambda t: [t.pop(f"{EXPERTS}.2.up_proj.lora_{letter}.weight") for letter in "AB"],
            "for each of the 4 experts",
        ),
        (lambda t: t[f"{EXPERTS}.2.up_proj.lora_A.weight"].add_(1), "with one A for both"),
        (
            lambda t: [t[f"{EXPERTS}.2.{leaf}.lora_A.weight"].add_(1) for leaf in ("gate_proj", "up_proj")],
            "lora_A, exp",
        ),
        (lambda t: [t.pop(key) for key in list(t) if "layers.1.mlp" in key], "has no .*gate_up_proj.lora_A"),
    ],
    ids=["half a pair", "an expert", "another A", "independent", "a layer"],
)
def test_files_that_do_not_fit_the_experts_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], object], words: str, tmp_path: Path
) -> None:
    shop = Workshop(tiny_qwen3_moe())
    adapter = trained(shop, AdapterSpec(3))
    with written_aside(tmp_path / "state") as aside:
        tensors = {key: tensor.clone() for key, tensor in written(adapter, "peft").items()}
        change(tensors)
        write_tensors(aside / "adapter_model.safetensors", tensors)
        seal(aside)
    before = adapter.weights.clone()
    with pytest.raises(CheckpointError, match=words):
        load_state(adapter, tmp_path / "state", optimizer=False)
    assert torch.equal(adapter.weights, before)
