"""tinker-cookbook's weights package on the adapters that are saved as the hosted service's are. `make cookbook`."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorry.actors.adapters.checkpoints import load_sampler_weights, save_sampler_weights
from lorry.actors.adapters.folders import seal
from lorry.actors.model.spec import AdapterSpec
from lorry.wire.types import AdamParams, ExpertLora
from tests.actors.models import tiny_deepseek_v3, tiny_gpt_oss, tiny_qwen3, tiny_qwen3_moe
from tests.actors.workshop import Family, Workshop, assert_agrees, job, request
from tests.conftest import ROOT

PYTHON = ROOT / "build/cookbook/bin/python"


def saved(family: Family, layout: ExpertLora, folder: Path) -> Workshop:
    """A trained adapter in FOLDER/adapter, and its base in FOLDER/base."""
    family().save_pretrained(folder / "base")
    shop = Workshop(family())
    adapter = shop.add("run", AdapterSpec(3, seed=1, expert_lora=layout))
    shop.engine.forward_backward([job("run", request(0))])
    shop.engine.optim_step([("run", AdamParams(learning_rate=1e-2))])
    save_sampler_weights(adapter, replace(shop.targets, layout="tinker"), folder / "adapter", "tiny/model")
    return shop


def run(program: str, folder: Path) -> None:
    ended = subprocess.run(
        [PYTHON, ROOT / "tests/cookbook/programs.py", program, folder],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.mark.parametrize("layout", ["shared", "independent"])
@pytest.mark.parametrize("family", [tiny_qwen3, tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3])
def test_it_merges_an_adapter_into_its_base(family: Family, layout: ExpertLora, tmp_path: Path) -> None:
    shop = saved(family, layout, tmp_path)
    run("merge", tmp_path)
    assert_agrees(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), shop)


@pytest.mark.parametrize("layout", ["shared", "independent"])
@pytest.mark.parametrize("family", [tiny_qwen3, tiny_qwen3_moe])
def test_what_it_converts_for_servers_is_the_adapter(family: Family, layout: ExpertLora, tmp_path: Path) -> None:
    shop = saved(family, layout, tmp_path)
    run("convert", tmp_path)
    seal(tmp_path / "converted")
    converted = load_sampler_weights(shop.targets, tmp_path / "converted", "cpu")
    assert converted.spec.expert_lora == layout or family is tiny_qwen3
    assert torch.equal(converted.weights, shop.pool.get("run").weights)
