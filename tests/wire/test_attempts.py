"""Wrong keys are counted by peer, fairly, and in bounded memory."""

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from lorry.wire.attempts import Attempts, Lately, Pace

PEERS = st.sampled_from("abc")
PAUSES = st.floats(0, 5)
TRIES = st.lists(st.tuples(PEERS, PAUSES), max_size=200)


@given(tried=TRIES, burst=st.integers(1, 6), every_s=st.floats(0.1, 10))
def test_nobody_has_more_tries_than_the_burst_and_what_time_has_brought(
    tried: list[tuple[str, float]], burst: int, every_s: float
) -> None:
    attempts, at = Attempts(burst, every_s), 0.0
    let_in: dict[str, list[float]] = {}
    for peer, pause in tried:
        at += pause
        if attempts.take(peer, at) == 0:
            let_in.setdefault(peer, []).append(at)
    for moments in let_in.values():
        for first, start in enumerate(moments):
            for last, end in enumerate(moments[first:], 1):
                assert last <= burst + (end - start) / every_s + 1e-6


@given(tried=TRIES, burst=st.integers(1, 6), every_s=st.floats(0.1, 10))
def test_who_waits_as_long_as_he_is_told_may_try_and_not_much_earlier(
    tried: list[tuple[str, float]], burst: int, every_s: float
) -> None:
    attempts, at = Attempts(burst, every_s), 0.0
    for peer, pause in tried:
        at += pause
        if after_s := attempts.take(peer, at):
            assert attempts.take(peer, at + after_s * 0.9) > 0
            assert attempts.take(peer, at + after_s) == 0
            at += after_s


@given(tried=TRIES)
def test_what_others_try_is_nothing_to_a_peer(tried: list[tuple[str, float]]) -> None:
    together, alone = Attempts(3), Attempts(3)
    moments = accumulate(pause for _, pause in tried)
    for (peer, _), at in zip(tried, moments, strict=True):
        after_s = together.take(peer, at)
        if peer == "a":
            assert after_s == alone.take(peer, at)


@given(tried=TRIES)
def test_who_is_always_right_is_never_told_to_wait(tried: list[tuple[str, float]]) -> None:
    attempts, at = Attempts(1), 0.0
    for peer, pause in tried:
        at += pause
        assert attempts.take(peer, at) == 0
        attempts.give_back(peer, at)
    assert len(attempts) == 0, "and nothing is left of it"


@given(names=st.lists(st.integers(0, 50), max_size=200), at_most=st.integers(1, 10))
def test_memory_is_bounded_and_those_who_came_last_are_remembered(names: list[int], at_most: int) -> None:
    attempts, lately = Attempts(1, 1e9, at_most), Lately[int](at_most)
    for name in names:
        attempts.take(str(name), 0.0)
        lately.say(str(name), name, 0.0)
        assert len(attempts) <= at_most and len(lately) <= at_most
    latest = list(dict.fromkeys(reversed(names)))[:at_most]
    for name in latest:
        assert attempts.take(str(name), 0.0) > 0
        assert lately.of(str(name), 0.0) == name


def test_what_was_said_of_a_name_is_over_after_its_time() -> None:
    lately = Lately[str](10, for_s=5.0)
    lately.say("a", "wrong", 1.0)
    assert [lately.of("a", now) for now in (1.0, 5.9, 6.0)] == ["wrong", "wrong", None]
    lately.say("a", "wrong", 7.0)
    lately.forget("a")
    assert lately.of("a", 7.0) is None


@given(tried=TRIES, every_s=st.floats(0.001, 10))
def test_a_peers_turns_are_apart_and_none_is_further_away_than_it_may_be(
    tried: list[tuple[str, float]], every_s: float
) -> None:
    pace, at_most_s, at = Pace(every_s, 20.0), 20.0, 0.0
    turns: dict[str, float] = {}
    for peer, pause in tried:
        at += pause
        turn = at + pace.wait_s(peer, at)
        assert at <= turn <= at + at_most_s + 1e-9
        if turn < at + at_most_s - 1e-9 and peer in turns:
            assert turn >= turns[peer] + every_s - 1e-9
        turns[peer] = turn
