import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorry.actors.sampling.tokens import Sampled, SamplingRows, keep_likeliest, sample, split_mix, uniforms
from lorry.wire.types import SamplingParams

LOGITS = torch.tensor([1.5, -0.3, 0.8, 0.8, 2.0, -1.0, 0.1, -2.0])
DRAWS = 20_000


def draw(logits: Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], positions: Tensor) -> Sampled:
    rows = SamplingRows.of(params, seeds, [False] * len(params), "cpu")
    return sample(logits, rows, positions)


def chi_squared_p_value(counts: Tensor, expected: Tensor) -> float:
    """Survival function of the chi-squared distribution, through the regularized incomplete gamma function."""
    possible = expected > 0
    assert counts[~possible].sum() == 0
    expected = expected[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic.double() / 2))


def frequencies(params: SamplingParams) -> Tensor:
    tokens = draw(LOGITS.expand(DRAWS, -1), [params] * DRAWS, [7] * DRAWS, torch.arange(DRAWS)).tokens
    return torch.bincount(tokens, minlength=len(LOGITS)).double()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_distribution(temperature: float) -> None:
    counts = frequencies(SamplingParams(temperature=temperature))
    assert chi_squared_p_value(counts, (LOGITS.double() / temperature).softmax(-1)) > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_distribution_that_top_k_leaves(temperature: float) -> None:
    counts = frequencies(SamplingParams(temperature=temperature, top_k=3))
    expected = (LOGITS.double() / temperature).softmax(-1)
    expected[[1, 3, 5, 6, 7]] = 0  # of the equals 2 and 3, the lower id stays
    assert chi_squared_p_value(counts, expected / expected.sum()) > 1e-3


@pytest.mark.parametrize(("temperature", "nucleus"), [(0.5, 2), (1.0, 3), (2.0, 4)])
def test_frequencies_follow_the_distribution_that_top_p_leaves(temperature: float, nucleus: int) -> None:
    counts = frequencies(SamplingParams(temperature=temperature, top_p=0.7))
    likeliest, tokens = (LOGITS.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    assert likeliest[: nucleus - 1].sum() < 0.7 <= likeliest[:nucleus].sum()
    expected = torch.zeros(len(LOGITS), dtype=torch.float64)
    expected[tokens[:nucleus]] = likeliest[:nucleus] / likeliest[:nucleus].sum()
    assert chi_squared_p_value(counts, expected) > 1e-3


def test_top_p_counts_in_the_mass_that_top_k_left() -> None:
    probabilities = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]])
    kept = keep_likeliest(probabilities, torch.tensor([2]), torch.tensor([0.6]), head=2)
    torch.testing.assert_close(kept, torch.tensor([[0.4, 0, 0, 0, 0]]))


def test_a_nucleus_larger_than_the_sorted_head_is_found_by_a_full_sort() -> None:
    probabilities = torch.full((1, 100), 0.01)
    kept = keep_likeliest(probabilities, torch.tensor([100]), torch.tensor([0.5]), head=10)
    assert int((kept > 0).sum()) in (50, 51)
    assert bool((kept[0, :50] > 0).all())


def test_temperature_0_takes_the_likeliest_and_reports_its_untempered_logprob() -> None:
    sampled = draw(LOGITS[None], [SamplingParams(temperature=0)], [0], torch.tensor([0]))
    assert sampled.tokens.tolist() == [4]
    torch.testing.assert_close(sampled.logprobs, LOGITS.log_softmax(-1)[4:5])


def test_logprobs_are_of_the_tempered_distribution_before_the_cuts() -> None:
    params = SamplingParams(temperature=0.5, top_k=2, top_p=0.9)
    sampled = draw(LOGITS[None], [params], [3], torch.tensor([5]))
    torch.testing.assert_close(sampled.logprobs, (LOGITS / 0.5).log_softmax(-1)[sampled.tokens])


def test_the_likeliest_tokens_are_reported_for_the_rows_that_ask() -> None:
    rows = SamplingRows.of([SamplingParams()] * 2, [0, 1], [False, True], "cpu")
    sampled = sample(torch.stack([LOGITS, -LOGITS]), rows, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(sampled.top_logprobs, (-LOGITS).log_softmax(-1).sort(descending=True).values[None])


def test_a_row_of_nan_has_a_nan_logprob_and_leaves_its_neighbour_alone() -> None:
    logits = torch.stack([torch.full_like(LOGITS, math.nan), LOGITS])
    params = [SamplingParams(top_p=0.9)] * 2
    both = draw(logits, params, [1, 2], torch.tensor([4, 5]))
    alone = draw(LOGITS[None], params[1:], [2], torch.tensor([5]))
    assert math.isnan(both.logprobs[0])
    assert (both.tokens[1], both.logprobs[1]) == (alone.tokens[0], alone.logprobs[0])


def test_split_mix_gives_the_numbers_of_the_reference_code() -> None:
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    outputs = split_mix(torch.tensor(1234567), torch.arange(4))
    assert [value % 2**64 for value in outputs.tolist()] == reference


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    seeds, positions = torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200)
    values = uniforms(seeds, positions)
    assert 0 <= values.min() < values.max() < 1
    counts = torch.bincount((values * 50).long(), minlength=50).double()
    assert chi_squared_p_value(counts, torch.full((50,), 1 / 50, dtype=torch.float64)) > 1e-3


COUNT = st.integers(1, 30)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 1, 3, 50]),
    top_p=st.sampled_from([0.01, 0.5, 0.999, 1.0]),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(params, min_size=1, max_size=6), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_a_rows_token_does_not_depend_on_the_rows_beside_it(rows: list[SamplingParams], seed: int, chosen: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(rows), 40, generator=generator) * 3).round(decimals=0)  # many equals
    seeds, positions = [(seed + i) % 2**63 for i in range(len(rows))], torch.arange(len(rows)) * 7
    i = chosen % len(rows)
    together = draw(logits, rows, seeds, positions)
    alone = draw(logits[i : i + 1], rows[i : i + 1], seeds[i : i + 1], positions[i : i + 1])
    assert together.tokens[i] == alone.tokens[0]
    torch.testing.assert_close(together.logprobs[i], alone.logprobs[0])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=30), st.integers(1, 30), st.floats(0.01, 1), st.integers(1, 30)
)
def test_cuts_keep_the_fewest_tokens_that_hold_the_mass(weights: list[int], k: int, p: float, head: int) -> None:
    probabilities = torch.tensor([w + 1 for w in weights], dtype=torch.float32)
    probabilities = probabilities / probabilities.sum()
    vocab = len(weights)
    top_k = min(k, vocab)
    head = vocab if top_k == vocab else min(max(head, top_k), vocab)
    kept = keep_likeliest(probabilities[None], torch.tensor([top_k]), torch.tensor([p]), head)[0]
    likeliest = probabilities.double().sort(descending=True).values[:top_k]
    mass, held = likeliest.sum() * p, int((kept > 0).sum())
    assert set(kept[kept > 0].tolist()) == set(probabilities[kept > 0].tolist())
    assert kept[kept > 0].min() >= probabilities[kept == 0].max() if held < vocab else True
    assert likeliest[:held].sum() >= mass - 1e-6
    assert likeliest[: held - 1].sum() < mass + 1e-6
