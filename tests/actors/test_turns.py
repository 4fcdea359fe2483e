"""Training and sampling get their shares of the device, and sampling never waits for more than training is owed."""

from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.turns import FIRST_GUESS, Turns

shares = st.floats(0.05, 0.95)
seconds = st.floats(0.001, 10)


@given(shares, st.lists(st.tuples(seconds, seconds), min_size=1, max_size=200))
def test_over_any_costs_neither_side_is_ahead_by_more_than_its_dearest_turn(
    share: float, costs: list[tuple[float, float]]
) -> None:
    turns, train_s, sample_s = Turns(share, 8192), 0.0, 0.0
    dearest = max(p for p, _ in costs) / (1 - share) + max(s for _, s in costs) / share
    for pass_s, step_s in costs:
        if turns.sampling_is_due:
            turns.sampled(step_s, contended=True)
            sample_s += step_s
        else:
            turns.trained(pass_s, contended=True)
            train_s += pass_s
        assert abs(train_s / (1 - share) - sample_s / share) <= dearest + 1e-6


@given(shares, seconds, st.floats(1e-5, 1e-2))
def test_where_passes_can_be_split_tokens_are_as_far_apart_as_the_share_says(
    share: float, step_s: float, s_per_token: float
) -> None:
    turns = Turns(share, 10**9)
    turns.measured(100, 100 * s_per_token)
    waited, gaps = 0.0, list[float]()
    for _ in range(200):
        if turns.sampling_is_due or not gaps:
            turns.sampled(step_s, contended=True)
            gaps.append(waited + step_s)
            waited = 0.0
        else:
            tokens = turns.pass_tokens
            turns.trained(tokens * s_per_token, contended=True)
            turns.measured(tokens, tokens * s_per_token)
            waited += tokens * s_per_token
    assert max(gaps[1:]) <= step_s / share + s_per_token + 1e-9


def test_a_pass_that_cannot_be_split_is_followed_by_the_steps_it_delayed() -> None:
    turns = Turns(0.5, 8192)
    turns.sampled(1.0, contended=True)
    turns.trained(5.0, contended=True)
    steps = 0
    while turns.sampling_is_due:
        turns.sampled(1.0, contended=True)
        steps += 1
    assert steps == 4


def test_who_was_alone_owes_nothing() -> None:
    turns = Turns(0.5, 8192)
    for _ in range(100):
        turns.trained(10.0, contended=False)
    turns.sampled(1.0, contended=True)
    assert turns.owed_s == 0, "the latest pass alone counts, and sampling is still behind it"
    turns.sampled(10.0, contended=True)
    assert 0 < turns.owed_s <= 1


def test_before_a_pass_was_measured_its_size_is_a_guess() -> None:
    assert Turns(0.5, 8192).pass_tokens == FIRST_GUESS
    assert Turns(0.5, 100).pass_tokens == 100
