"""Training and sampling get their shares of the device, and sampling never waits for more than training is owed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.turns import SPREAD, Turns

shares = st.floats(0.05, 0.95)
seconds = st.floats(0.001, 10)


@given(shares, st.lists(st.tuples(seconds, seconds), min_size=1, max_size=200))
def test_over_any_costs_neither_side_is_ahead_by_more_than_its_dearest_turns_and_what_is_forgotten(
    share: float, costs: list[tuple[float, float]]
) -> None:
    turns, train_s, sample_s, forgotten_s, piece_s = Turns(share), 0.0, 0.0, 0.0, 0.0
    dearest = max(p for p, _ in costs) / (1 - share) + max(s for _, s in costs) / share
    for next_s, step_s in costs:
        if turns.sampling_is_due:
            forgotten_s += min(turns.owed_s, piece_s) / (1 - share)  # no room for another piece
            turns.sampled(step_s, contended=True)
            sample_s += step_s
            piece_s = 0.0
        else:
            turns.trained(next_s, contended=True)
            train_s += next_s
            piece_s = next_s
        lead_s = train_s / (1 - share) - sample_s / share
        assert -SPREAD * dearest - forgotten_s - 1e-6 <= lead_s <= dearest + 1e-6


def gaps(turns: Turns, share: float, steps: list[float], piece_s: float) -> list[float]:
    """The time between the ends of neighbouring steps, with training in pieces of `piece_s` between them; not of the
    first two, since training was alone before."""
    found, waited = list[float](), 0.0
    steps = steps[::-1]
    turns.trained(piece_s, contended=False)
    while steps:
        if turns.sampling_is_due:
            step_s = steps.pop()
            turns.sampled(step_s, contended=True)
            found.append(waited + step_s)
            waited = 0.0
        else:
            turns.trained(piece_s, contended=True)
            waited += piece_s
    return found[2:]


@given(shares, seconds, st.floats(0.001, 0.5))
def test_tokens_are_no_further_apart_than_the_share_says_and_by_less_than_a_piece_nearer(
    share: float, step_s: float, piece: float
) -> None:
    piece_s = piece * step_s * (1 - share) / share
    found = gaps(Turns(share), share, [step_s] * 50, piece_s)
    assert max(found) <= step_s / share + 1e-6
    assert min(found) >= step_s / share - piece_s - 1e-6


def test_what_a_long_step_earns_is_spread_over_several_turns() -> None:
    steps = [1.0] * 20 + [10.0] + [1.0] * 200
    found = gaps(Turns(0.5), 0.5, steps, 0.01)
    assert max(gap - step for gap, step in zip(found, steps[2:], strict=True)) < 1.2 + 10 / SPREAD
    assert sum(found) == pytest.approx(2 * sum(steps[2:]), rel=0.05)


def test_a_piece_that_is_longer_than_was_earned_is_followed_by_the_steps_it_delayed() -> None:
    turns = Turns(0.5)
    turns.sampled(1.0, contended=True)
    turns.trained(5.0, contended=True)
    steps = 0
    while turns.sampling_is_due:
        turns.sampled(1.0, contended=True)
        steps += 1
    assert steps == 4


def test_who_was_alone_owes_nothing() -> None:
    turns = Turns(0.5)
    for _ in range(100):
        turns.trained(10.0, contended=False)
    turns.sampled(1.0, contended=True)
    assert turns.owed_s == 0, "the latest piece alone counts, and sampling is still behind it"
    turns.sampled(10.0, contended=True)
    assert 0 < turns.owed_s <= 1
