"""Adapters leave: as PEFT's folders, and as models with the adapter in their weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorry.actors.adapters.checkpoints import save_sampler_weights
from lorry.actors.export import folders
from lorry.actors.export.folders import convert_adapter, merge_adapter
from lorry.actors.model.loading import load_model
from lorry.actors.model.spec import AdapterSpec
from lorry.wire.errors import CheckpointError, UnsupportedModelError
from lorry.wire.types import ExpertLora, FileLayout

from .models import (
    tiny_deepseek_v3,
    tiny_gpt_oss,
    tiny_llama,
    tiny_qwen3,
    tiny_qwen3_moe,
    tiny_qwen3_vl,
    tiny_qwen3_vl_moe,
)
from .quantised import Quantise, write
from .test_checkpoints import assert_peft_agrees, trained
from .test_quantised import FORMATS
from .workshop import Family, Workshop, assert_agrees, job, logprobs, request

SEEING = [tiny_qwen3_vl, tiny_qwen3_vl_moe]


def tied() -> PreTrainedModel:
    return tiny_qwen3(tie_word_embeddings=True)


def saved(model: PreTrainedModel, folder: Path, layout: FileLayout = "peft", **spec: Any) -> Workshop:
    """A trained adapter in FOLDER/adapter."""
    shop = Workshop(model)
    adapter = trained(shop, AdapterSpec(3, seed=1, **spec))
    save_sampler_weights(adapter, replace(shop.targets, layout=layout), folder / "adapter", "tiny/model")
    return shop


def assert_is_the_adapter(shop: Workshop, folder: Path) -> None:
    assert_agrees(load_model(folder, "auto"), shop)


@pytest.mark.parametrize("layout", ["shared", "independent"])
@pytest.mark.parametrize("family", [tiny_llama, tied, tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3, *SEEING])
def test_a_merged_model_has_the_adapters_logprobs(family: Family, layout: ExpertLora, tmp_path: Path) -> None:
    family().save_pretrained(tmp_path / "base")
    shop = saved(family(), tmp_path, expert_lora=layout)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    assert_is_the_adapter(shop, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # as in test_checkpoints
@pytest.mark.parametrize("layout", ["peft", "tinker"])
@pytest.mark.parametrize("family", [tied, tiny_qwen3_moe, tiny_gpt_oss, *SEEING])
def test_an_exported_adapter_is_pefts_whatever_it_was_saved_as(
    family: Family, layout: FileLayout, tmp_path: Path
) -> None:
    family().save_pretrained(tmp_path / "base")
    shop = saved(family(), tmp_path, layout)
    convert_adapter(tmp_path / "adapter", tmp_path / "exported", tmp_path / "base")
    assert_peft_agrees(shop, family, tmp_path / "exported")


def test_a_tied_head_that_is_not_trained_stays_tied(tmp_path: Path) -> None:
    tied().save_pretrained(tmp_path / "base")
    shop = saved(tied(), tmp_path, train_unembed=False)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.tie_word_embeddings
    assert_is_the_adapter(shop, tmp_path / "merged")


@pytest.mark.parametrize(("family", "quantise", "config"), FORMATS)
def test_a_quantised_base_is_expanded_and_merged(
    family: Callable[[], PreTrainedModel], quantise: Quantise, config: dict[str, Any], tmp_path: Path
) -> None:
    write(family(), tmp_path / "base", quantise, config)
    shop = saved(load_model(tmp_path / "base", "float32"), tmp_path)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", torch.float32)
    assert_is_the_adapter(shop, tmp_path / "merged")


def test_it_is_written_in_shards_with_the_files_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SHARD_BYTES", 20_000)
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size=30_000)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    shop = saved(tiny_llama(), tmp_path)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    assert_is_the_adapter(shop, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        with safe_open(shard, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20_000 or len(sizes) == 1


def test_what_does_not_fit_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path)
    export = (tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        merge_adapter(*export)
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"trains .*layers\.1\..*, which this base model does not have"):
        merge_adapter(*export)
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="expected"):
        merge_adapter(*export)
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="no base model in safetensors"):
        merge_adapter(*export)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|tied):UserWarning")
def test_a_tied_head_is_merged_right_where_pefts_own_merge_is_another_model(tmp_path: Path) -> None:
    shop, data = saved(tied(), tmp_path), request(5)
    own = cast(Any, PeftModel.from_pretrained(tied(), str(tmp_path / "adapter"))).merge_and_unload()
    ours = logprobs(shop.engine.forward_backward([job("run", data, backward=False)])[0])
    tokens, targets = data.data[0].model_input.to_ints(), data.data[0].loss_fn_inputs["target_tokens"].to_torch()
    with torch.no_grad():
        theirs = (
            own(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        )
    assert (theirs - ours[0]).abs().max() > 0.1
