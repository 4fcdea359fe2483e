"""What is decided about a request before anybody looks into it."""

import pytest

from lorry.wire.commands import SampleInput, check_lora_config, planned_tokens
from lorry.wire.errors import InvalidRequestError
from lorry.wire.types import LoraConfig, ModelInput, SamplingParams


@pytest.mark.parametrize(("max_tokens", "tokens"), [(5, 3 + 2 * 5), (None, 3 + 2 * 256)])
def test_a_sample_is_planned_at_its_prompt_and_the_longest_of_each_sequence(
    max_tokens: int | None, tokens: int
) -> None:
    request = SampleInput(ModelInput.from_ints([1, 2, 3]), 2, SamplingParams(max_tokens=max_tokens))
    assert planned_tokens(request) == tokens


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(rank=8), "train_mlp is True, expected False for this base model: its MLPs are mixtures of experts"),
        (LoraConfig(rank=8, train_mlp=False, train_unembed=True), "train_unembed is True"),
        (LoraConfig(rank=65, train_mlp=False, train_unembed=False), "rank is 65"),
    ],
)
def test_an_adapter_that_a_model_cannot_have_is_refused_by_its_facts(config: LoraConfig, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        check_lora_config(config, max_rank=64, trainable=["attn"], has_experts=True)
    check_lora_config(LoraConfig(rank=64, train_mlp=False, train_unembed=False), 64, ["attn"], has_experts=True)
