import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.training.losses import LossInputs, evaluate, sequence_ratios
from lorry.wire.commands import LOSSES

from .reference import plain_loss

CONFIGS = [
    ("cross_entropy", {}),
    ("importance_sampling", {}),
    ("ppo", {}),
    ("ppo", {"clip_low_threshold": 0.5}),
    ("cispo", {}),
    ("cispo", {"clip_high_threshold": 3.0}),
    ("dro", {}),
    ("dro", {"beta": 1.5}),
]
LOGPROB = st.floats(-12, 0, width=32)
TOKEN = st.tuples(LOGPROB, LOGPROB, st.floats(-4, 4, width=32), st.floats(0, 2, width=32))


@pytest.mark.parametrize(("loss_fn", "config"), CONFIGS)
@given(tokens=st.lists(TOKEN, min_size=1, max_size=12))
def test_losses_and_gradients_equal_autograd_of_the_documented_formula(
    loss_fn: str, config: dict[str, float], tokens: list[tuple[float, float, float, float]]
) -> None:
    p, q, advantages, weights = torch.tensor(tokens, dtype=torch.float32).T
    p = p.clone().requires_grad_()
    expected = plain_loss(loss_fn, p, {"logprobs": q, "advantages": advantages, "weights": weights}, config)
    (expected_grad,) = torch.autograd.grad(expected.sum(), p)
    losses, grads = evaluate(loss_fn, config, p.detach(), LossInputs(weights, q, advantages))
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, expected_grad, rtol=1e-5, atol=1e-6)


@given(sequences=st.lists(st.lists(TOKEN, min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_sequence_ratio_is_the_geometric_mean_over_its_masked_tokens(
    sequences: list[list[tuple[float, float, float, float]]],
) -> None:
    p, q, _, mask = torch.tensor([token for tokens in sequences for token in tokens], dtype=torch.float32).T
    found = sequence_ratios(p, q, mask, torch.tensor([len(tokens) for tokens in sequences]))
    for tokens, ratios in zip(sequences, found.split([len(tokens) for tokens in sequences]), strict=True):
        gaps = [token[0] - token[1] for token in tokens if token[3] != 0]
        expected = math.exp(statistics.fmean(gaps)) if gaps else 1.0
        torch.testing.assert_close(ratios, torch.full_like(ratios, expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_ppo_stops_where_the_ratio_left_its_range_in_the_direction_of_the_advantage(
    ratio: float, advantage: float, loss: float, grad: float
) -> None:
    p = torch.tensor([ratio]).log()
    inputs = LossInputs(torch.ones(1), torch.zeros(1), torch.tensor([advantage]))
    losses, grads = evaluate("ppo", {}, p, inputs)
    torch.testing.assert_close((losses, grads), (torch.tensor([loss]), torch.tensor([grad])))


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_masked_token_counts_nothing_even_where_its_ratio_overflows(loss_fn: str) -> None:
    overflown = torch.tensor([torch.inf])
    inputs = LossInputs(torch.zeros(1), torch.tensor([-1000.0]), torch.ones(1), overflown)
    losses, grads = evaluate(loss_fn, {}, torch.zeros(1), inputs)
    assert (losses.item(), grads.item()) == (0.0, 0.0)
