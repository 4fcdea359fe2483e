"""Published checkpoints are quantised. They are loaded as the weights that they stand for."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, dynamic_module_utils

from lorry.actors.model.base_model import load_base_model
from lorry.actors.model.lora import attach_lora
from lorry.wire.errors import UnsupportedModelError

from .models import tiny_deepseek_v3, tiny_gpt_oss, tiny_llama
from .quantised import INT4_GROUP, Quantise, fp8, int4, mxfp4, plain, write

GPT_OSS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}
LATENT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "q_lora_rank": 160,
    "kv_lora_rank": 261,
}
"""As in DeepSeek-V3 itself, blocks of 128 are cut off at the end of some weights, which have 160 and 269 rows here."""
INT4_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": INT4_GROUP,
                "dynamic": False,
            },
        }
    },
}
FORMATS = [
    pytest.param(
        lambda: tiny_gpt_oss(**GPT_OSS),
        mxfp4,
        {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}},
        id="GPT-OSS in MXFP4",
    ),
    pytest.param(
        lambda: tiny_deepseek_v3(**LATENT),
        fp8,
        {
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "scale_fmt": "ue8m0",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            }
        },
        id="DeepSeek-V3 in FP8",
    ),
    pytest.param(
        lambda: tiny_deepseek_v3(**LATENT),
        int4,
        {
            "model_type": "kimi_k2",
            "architectures": ["DeepseekV3ForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekV3Config",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
            },
            "quantization_config": INT4_CONFIG,
        },
        id="Kimi-K2 in INT4",
    ),
]


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize(("family", "quantise", "config"), FORMATS)
def test_a_quantised_checkpoint_is_the_weights_that_it_was_made_of(
    family: Callable[[], PreTrainedModel], quantise: Quantise, config: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    expected = write(family(), tmp_path / "model", quantise, config)
    (tmp_path / "model" / "modeling_deepseek.py").write_text("raise AssertionError('code beside the weights was run')")
    base = load_base_model(tmp_path / "model", dtype=dtype)
    found = base.model.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.float(), expected[key].float(), rtol=0, atol=0, msg=key)
    assert base.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    assert {target.group for target in attach_lora(base).modules} == {"attn", "mlp", "unembed"}


def test_a_checkpoint_that_is_quantised_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    write(tiny_gpt_oss(**GPT_OSS), tmp_path / "model", plain, {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(UnsupportedModelError, match="quantised by 'awq', expected one of"):
        load_base_model(tmp_path / "model")


def test_code_beside_the_weights_runs_where_the_operator_trusts_it_and_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, marker = tmp_path / "model", tmp_path / "was-run"
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    write(tiny_llama(), model, plain, {"model_type": "odd", "auto_map": auto_map})
    (model / "odd.py").write_text(
        f"""
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({str(marker)!r}).touch()


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""
    )
    with pytest.raises(UnsupportedModelError, match="contains custom code"):
        load_base_model(model)
    assert not marker.exists()
    load_base_model(model, trust_remote_code=True)
    assert marker.exists()
