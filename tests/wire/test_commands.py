"""What is decided about a request before anybody looks into it."""

from typing import Any, cast

import pytest

from lorry.wire.commands import SampleInput, check_lora_config, planned_tokens
from lorry.wire.errors import InvalidRequestError
from lorry.wire.model_input import ModelInput
from lorry.wire.types import LoraConfig, SamplingParams


@pytest.mark.parametrize(("max_tokens", "tokens"), [(5, 3 + 2 * 5), (None, 3 + 2 * 256)])
def test_a_sample_is_planned_at_its_prompt_and_the_longest_of_each_sequence(
    max_tokens: int | None, tokens: int
) -> None:
    request = SampleInput(ModelInput.from_ints([1, 2, 3]), 2, SamplingParams(max_tokens=max_tokens))
    assert planned_tokens(request) == tokens


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(rank=8), "train_mlp is True, expected False for this base model: its MLPs are OddExperts"),
        (LoraConfig(rank=8, train_mlp=False, train_unembed=True), "train_unembed is True"),
        (LoraConfig(rank=65, train_mlp=False, train_unembed=False), "rank is 65"),
        (LoraConfig(rank=8, expert_lora=cast(Any, "odd")), "expert_lora is 'odd'"),
        (LoraConfig(rank=8, alpha=0.0), "alpha is 0.0"),
        (LoraConfig(rank=8, alpha=float("inf")), "alpha is inf"),
        (LoraConfig(rank=8, target_modules=[]), r"target_modules is \[\]"),
        (LoraConfig(rank=8, target_modules=["q_proj", ""]), "target_modules is"),
    ],
)
def test_an_adapter_that_a_model_cannot_have_is_refused_by_its_facts(config: LoraConfig, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        check_lora_config(config, max_rank=64, trainable=["attn"], frozen_experts="OddExperts")
    attention = LoraConfig(rank=64, train_mlp=False, train_unembed=False)
    check_lora_config(attention, 64, ["attn"], frozen_experts="OddExperts")
