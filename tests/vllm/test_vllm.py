"""vLLM serves what Lorry saved and merged, and gives Lorry's logprobs. `make vllm`.

vLLM pins a torch of its own, so it gets an environment of its own; nothing of it needs the network, or a GPU.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorry.actors.adapters.checkpoints import save_sampler_weights
from lorry.actors.export.folders import merge_adapter
from lorry.actors.model.spec import AdapterSpec
from lorry.wire.commands import ForwardBackwardInput
from lorry.wire.model_input import ModelInput
from lorry.wire.types import Datum, TensorData
from tests.actors.models import tiny_gpt_oss, tiny_llama, tiny_qwen3, tiny_qwen3_moe
from tests.actors.workshop import Workshop, job, logprobs
from tests.conftest import ROOT

Family = Callable[..., PreTrainedModel]
TOKENS = [7 * i % 500 for i in range(1, 24)]
SHAPE: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128, "vocab_size": 512}
"""As small as vLLM's attention on a CPU takes heads."""


def run(program: str, *arguments: str | Path) -> Any:
    """What it printed last. Fails with its errors where it fails."""
    ended = subprocess.run(
        [ROOT / "build/vllm/bin/python", ROOT / "tests/vllm" / program, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


def saved(family: Family, folder: Path, **changes: Any) -> Workshop:
    """A base in FOLDER/base, and in FOLDER/adapter an adapter on all of its layers."""
    family(**changes).save_pretrained(folder / "base")
    shop = Workshop(family(**changes))
    adapter = shop.add("run", AdapterSpec(8, seed=1))
    save_sampler_weights(adapter, shop.targets, folder / "adapter", "tiny/model")
    return shop


def ours(shop: Workshop) -> torch.Tensor:
    """Of each token but the first."""
    datum = Datum(ModelInput.from_ints(TOKENS[:-1]), {"target_tokens": TensorData.from_torch(torch.tensor(TOKENS[1:]))})
    (found,) = shop.engine.forward_backward([job("run", ForwardBackwardInput([datum], "cross_entropy"), False)])
    return logprobs(found)[0]


def vllms(model: Path, *adapter: Path) -> torch.Tensor:
    return torch.tensor(run("program.py", model, ",".join(map(str, TOKENS)), *adapter))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", [tiny_llama, tiny_qwen3])
def test_it_serves_an_adapter_as_it_was_saved(family: Family, tied: bool, tmp_path: Path) -> None:
    shop = saved(family, tmp_path, tie_word_embeddings=tied, **SHAPE)
    torch.testing.assert_close(vllms(tmp_path / "base", tmp_path / "adapter"), ours(shop), rtol=0, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_it_serves_a_merged_model_as_transformers_does(tied: bool, tmp_path: Path) -> None:
    shop = saved(tiny_qwen3, tmp_path, tie_word_embeddings=tied, **SHAPE)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    expected = ours(shop)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS[:-1]]), use_cache=False).logits[0]
    transformers = logits.log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    torch.testing.assert_close(transformers, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(vllms(tmp_path / "merged"), expected, rtol=0, atol=1e-4)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]


def test_its_reader_takes_adapters_on_experts_that_are_modules(tmp_path: Path) -> None:
    saved(tiny_qwen3_moe, tmp_path)
    each = [f"experts.{i}.{leaf}" for i in range(4) for leaf in ("gate_proj", "up_proj", "down_proj")]
    read = run("reader.py", tmp_path / "adapter", *ATTENTION, *each)
    for name in each:
        inputs, outputs = (24, 32) if "down" in name else (32, 24)
        assert read[f"model.layers.1.mlp.{name}"] == [[8, inputs], [outputs, 8]]
    assert read["lm_head"] == [[8, 32], [97, 8]]


def test_its_reader_takes_adapters_on_experts_that_are_one_weight(tmp_path: Path) -> None:
    saved(tiny_gpt_oss, tmp_path)
    read = run("reader.py", tmp_path / "adapter", *ATTENTION, "experts")
    assert read["model.layers.1.mlp.experts.base_layer"] == [[4 * 8, 32], [2 * 48, 4 * 8]]
    assert read["model.layers.1.mlp.experts"] == [[4 * 8, 48], [32, 4 * 8]]
