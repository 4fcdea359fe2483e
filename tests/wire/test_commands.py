import pytest

from lorry.wire.commands import SampleInput, planned_tokens
from lorry.wire.types import ModelInput, SamplingParams


@pytest.mark.parametrize(("max_tokens", "tokens"), [(5, 3 + 2 * 5), (None, 3 + 2 * 256)])
def test_a_sample_is_planned_at_its_prompt_and_the_longest_of_each_sequence(
    max_tokens: int | None, tokens: int
) -> None:
    request = SampleInput(ModelInput.from_ints([1, 2, 3]), 2, SamplingParams(max_tokens=max_tokens))
    assert planned_tokens(request) == tokens
