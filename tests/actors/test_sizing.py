"""The models of the line-up at full size, without weights: what adapters train, and what `docs/models.md` says."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from lorry.actors.group.dividing import outline_of_rank
from lorry.actors.group.parts import factors_of
from lorry.actors.model.base_model import outline, wrap_model
from lorry.actors.model.lineup import LINE_UP
from lorry.actors.model.lora import attach_lora
from lorry.actors.model.sizing import Sizing, size_of, sizing
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.model.survey import survey
from lorry.plan import Devices, foresee, print_plan
from lorry.wire.errors import InvalidRequestError, UnsupportedModelError
from lorry.wire.types import Quantization

from .models import tiny_deepseek_v3, tiny_gpt_oss, tiny_llama, tiny_qwen3, tiny_qwen3_moe
from .test_quantised import FORMATS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}
BILLIONS = {  # as the models' cards have them
    "Qwen3-4B": 4.0,
    "Qwen3-8B": 8.2,
    "Qwen3-32B": 32.8,
    "Qwen3-30B": 30.5,
    "Qwen3-235B": 235.1,
    "Qwen3-VL-30B": 31.1,
    "Qwen3-VL-235B": 235.7,
    "Llama-3.1-8B": 8.0,
    "Llama-3.1-70B": 70.6,
    "Llama-3.3-70B": 70.6,
    "Llama-3.2-1B": 1.2,
    "Llama-3.2-3B": 3.2,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "DeepSeek-V3.1": 671.0,
    "Kimi-K2": 1026.4,
}

of_name = cache(size_of)


def leaves(size: Sizing) -> set[str]:
    return {".".join(target.name.split(".")[-2 if target.experts else -1 :]) for target in size.sites.targets}


def expected_leaves(name: str) -> set[str]:
    if "DeepSeek" in name or "Kimi" in name:
        return LATENT | MLP | EXPERTS | {"lm_head"}
    if "oss" in name or re.search(r"-A\d+B", name):
        return ATTENTION | EXPERTS | {"lm_head"}
    return ATTENTION | MLP | {"lm_head"}


@pytest.mark.parametrize("name", LINE_UP)
def test_a_model_has_its_parameters_and_trains_all_of_its_layers(name: str) -> None:
    size = of_name(name)
    known = max((key for key in BILLIONS if key in name), key=len)
    assert round(size.parameters / 1e9, 1) == BILLIONS[known]
    assert leaves(size) == expected_leaves(name)
    assert size.sites.frozen_experts is None
    groups = {group: sum(t.group == group for t in size.sites.targets) for group in ("attn", "mlp", "unembed")}
    assert groups["attn"] == size.layers * (5 if leaves(size) >= LATENT else 4)
    assert groups["mlp"] >= 2 * size.layers - 3
    assert groups["unembed"] == 1
    assert not [target.name for target in size.sites.targets if "visual" in target.name]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("openai/gpt-oss-20b", {"quantization_config": {"quant_method": "mxfp4"}}),
        ("deepseek-ai/DeepSeek-V3.1", FORMATS[1].values[2]),
        ("moonshotai/Kimi-K2-Thinking", FORMATS[2].values[2]),
    ],
)
def test_a_quantised_models_folder_is_sized_as_what_it_is_expanded_to(
    name: str, published: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(LINE_UP[name]) | published))
    found, expected = size_of(str(tmp_path)), of_name(name)
    assert found.parameters == expected.parameters
    assert found.sites.targets == expected.sites.targets


def test_shared_experts_of_the_30b_take_what_the_formula_says_and_independent_ones_two_and_a_half_times_that() -> None:
    size = of_name("Qwen/Qwen3-30B-A3B")
    rank, hidden, inner, experts = 32, 2048, 768, 128
    shared = rank * hidden + experts * 2 * inner * rank + experts * rank * inner + hidden * rank
    each = experts * rank * (hidden + 2 * inner + inner + hidden)
    alone = AdapterSpec(rank, train_attn=False, train_unembed=False)
    assert size.adapter_parameters(alone) == 48 * shared
    independent = AdapterSpec(rank, train_attn=False, train_unembed=False, expert_lora="independent")
    assert size.adapter_parameters(independent) == 48 * each


@pytest.mark.parametrize("family", [tiny_qwen3, tiny_llama, tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3])
def test_a_sizing_is_what_the_model_itself_has(family: Callable[[], PreTrainedModel]) -> None:
    model = family()
    size, base = sizing(model.config), wrap_model(model)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    targets = attach_lora(base)
    assert size.sites.targets == targets.modules
    assert size.cache_numbers * base.dtype.itemsize == survey(base).token_bytes
    adapter = targets.new_adapter(AdapterSpec(4), "cpu")
    assert (size.adapter_parameters(adapter.spec), size.adapter_bytes(adapter.spec, 4)) == (
        adapter.size,
        adapter.nbytes,
    )


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", [tiny_qwen3, tiny_llama, tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3])
def test_a_ranks_sizing_is_what_the_rank_with_most_of_the_model_has(
    family: Callable[[], PreTrainedModel], ranks: int
) -> None:
    model, spec = family(), AdapterSpec(4)
    size, base = sizing(model.config).of_rank(ranks), outline(model.config, torch.float32)
    base, targets = outline_of_rank(base, attach_lora(base), ranks)
    weights = sum(p.numel() for name, p in base.model.named_parameters() if not name.endswith(("bias", "sinks")))
    others = size.parameters - weights  # which are counted as if every rank had them all
    assert 0 <= others <= sum(p.numel() for name, p in model.named_parameters() if name.endswith(("bias", "sinks")))
    assert size.cache_numbers * base.dtype.itemsize == survey(base).token_bytes
    factors = [factor for target in targets.modules for factor in factors_of(spec, target)]
    assert size.adapter_parameters(spec) == sum(factor.own_elements for factor in factors)


def rows() -> dict[str, list[str]]:
    """By model: parameters, weights, an adapter of rank 32 with its optimizer, keys and values of a token, devices."""
    found: dict[str, list[str]] = {}
    for name in LINE_UP:
        size, spec = of_name(name), AdapterSpec(32)
        found[name] = [
            f"{size.parameters / 1e9:,.1f} B",
            f"{size.parameters * 2 / 2**30:,.1f} GiB",
            f"{size.adapter_bytes(spec, 2) / 2**30:,.1f} GiB",
            f"{size.cache_numbers * 2 / 1024:,.0f} KiB",
            str(size.least_ranks(spec, 2, 80 * 2**30)),
        ]
    return found


def test_the_page_of_models_has_all_of_the_line_up_with_its_numbers() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {name.strip("`"): rest[:5] for name, *rest in cells} == rows()
    tests = PAGE.parent.parent / "tests"
    sources = "".join(path.read_text() for path in tests.rglob("test_*.py"))
    for *_, shown in cells:
        for test in re.findall(r"test_\w+", shown):
            assert f"def {test}(" in sources, test


def printed(
    model: str, dtype: str = "bfloat16", devices: Devices | None = None, quantize: Quantization = "none"
) -> str:
    console = Console(record=True, width=160)
    print_plan(console, foresee(model, dtype, 32, devices, quantize))
    return " ".join(console.export_text().split())


def test_a_plan_says_what_fits() -> None:
    assert "weights in bfloat16 │ 56.9 GiB" in printed("Qwen/Qwen3-30B-A3B")
    too_little = "1 x 80 GiB: too little for the weights, one adapter of rank 32 and a pass: it takes 4 such devices."
    assert too_little in printed("openai/gpt-oss-120b", devices=Devices(1, 80))
    assert "4 x 80 GiB: --tensor-parallel 4 --slots " in printed("openai/gpt-oss-120b", devices=Devices(4, 80))
    assert "4 x 8 GiB: too little" in printed("deepseek-ai/DeepSeek-V3.1", devices=Devices(4, 8))
    with pytest.raises(UnsupportedModelError, match="64 attention heads cannot be divided among 3 devices"):
        printed("openai/gpt-oss-120b", devices=Devices(3, 80))
    assert "--slots 1 for rank 32" in printed("Qwen/Qwen3-30B-A3B", devices=Devices(1, 80))
    slots = re.search(r"--slots (\d+) for", printed("Qwen/Qwen3-8B", devices=Devices(1, 80)))
    assert slots is not None and int(slots[1]) > 10
    in_4_bits = printed("Qwen/Qwen3-32B", devices=Devices(1, 48), quantize="nf4")
    assert "weights in nf4, the rest in bfloat16 │ 17.9 GiB" in in_4_bits
    assert "--slots 1 for rank 32" in in_4_bits


def test_a_plan_of_what_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no configuration of .*Known by name are Qwen/Qwen3-4B"):
        printed(str(tmp_path))
    with pytest.raises(InvalidRequestError, match="dtype is 'int8'"):
        printed("Qwen/Qwen3-8B", "int8")
