"""What is wrong with a run, by what it told."""

import math
from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from lorry.gateway.console.alarms import Told, alarms
from lorry.wire.ids import RunId
from lorry.wire.metrics import RunPoint, Source
from lorry.wire.timelines import FailedCommand

NOW = 1_000_000.0


def points(name: str, values: Sequence[float], source: Source = "training", every_s: float = 1.0) -> list[RunPoint]:
    """The last one at NOW."""
    first = NOW - every_s * (len(values) - 1)
    run = RunId("run-1")
    return [RunPoint(run, source, step, first + every_s * step, {name: value}) for step, value in enumerate(values)]


def kinds(told: Told, now: float = NOW) -> list[str]:
    return [alarm.kind for alarm in alarms(told, now)]


def test_a_run_that_goes_on_as_it_should_raises_none() -> None:
    rising = points("reward", [step / 100 for step in range(100)], "loop")
    falling = points("loss:sum", [100 / (step + 1) for step in range(100)])
    assert kinds(Told(rising + falling)) == []
    assert kinds(Told([])) == []


def test_a_number_that_is_not_finite_is_told_with_its_step() -> None:
    (alarm,) = alarms(Told(points("loss:sum", [1.0, math.inf, 2.0])), NOW)
    assert (alarm.text, alarm.since) == ("loss:sum was inf at step 1", NOW - 1)
    assert alarm.is_serious
    (alarm,) = alarms(Told(points("loss:sum", [1.0, math.nan, math.nan, 2.0])), NOW)
    assert alarm.text == "loss:sum was nan from step 1 to 2 (2 times)"
    assert kinds(Told(points("loss:sum", [math.nan, *[1.0] * 50]))) == []  # long ago


def test_a_command_that_failed_since_the_last_step_is_told() -> None:
    told = points("loss:sum", [1.0, 2.0])
    failed = FailedCommand(NOW + 1, 7, "forward_backward", "NonFiniteError", "the loss is nan")
    (alarm,) = alarms(Told(told, [failed]), NOW + 2)
    assert alarm.text == "forward_backward (seq 7): the loss is nan"
    earlier = FailedCommand(NOW - 0.5, 3, "forward_backward", "NonFiniteError", "the loss is nan")
    assert kinds(Told(told, [earlier])) == []


def test_a_run_stalls_when_it_is_silent_for_much_longer_than_a_step_takes() -> None:
    told = points("loss:sum", [1.0] * 10, every_s=30.0)
    assert kinds(Told(told), NOW + 299) == []
    assert kinds(Told(told), NOW + 301) == ["stalled"]
    assert kinds(Told(told, is_over=True), NOW + 301) == []
    assert kinds(Told(told), NOW + 86_401) == []  # over, whoever forgot to say so
    assert kinds(Told(told[:2]), NOW + 1000) == []  # nobody knows how long its steps take
    quick = points("loss:sum", [1.0] * 10, every_s=0.01)
    assert kinds(Told(quick), NOW + 100) == []
    (alarm,) = alarms(Told(told, waiting=1), NOW + 301)
    assert alarm.text == "no step for 5 min, where one took 30 s; some of it waits here"


def test_a_reward_is_flat_when_what_it_rose_by_is_noise() -> None:
    random = Random(1)
    noise = [random.gauss(0.5, 0.1) for _ in range(60)]
    assert kinds(Told(points("env/reward", noise, "loop"))) == ["flat"]
    assert kinds(Told(points("env/reward", noise[:49], "loop"))) == []  # too early to say
    assert kinds(Told(points("loss:sum", noise))) == []  # nobody wants it to rise
    rising = [value + step * 0.01 for step, value in enumerate(noise)]
    assert kinds(Told(points("env/reward", rising, "loop"))) == []
    assert kinds(Told(points("reward", [1e308] * 50))) == []  # too large to be averaged
    (alarm,) = alarms(Told(points("accuracy", [1.0] * 50)), NOW)
    assert alarm.text == "accuracy has not risen in 50 steps: 1, then 1"


@given(
    values=st.lists(st.floats(), max_size=120),
    name=st.sampled_from(["reward", "loss:sum", "x"]),
    every_s=st.floats(0, 1e6),
    silent_s=st.floats(-10, 1e9),
)
def test_no_numbers_make_it_fail(values: list[float], name: str, every_s: float, silent_s: float) -> None:
    for alarm in alarms(Told(points(name, values, every_s=every_s)), NOW + silent_s):
        assert alarm.text
        assert math.isfinite(alarm.since)
