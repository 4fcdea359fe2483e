"""When a compute thread is taken to hang."""

import pytest

from lorry.actors.progress import MULTIPLE, Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr("lorry.actors.progress.time.monotonic", lambda: clock[0])
    return clock


def test_who_rests_never_hangs(clock: list[float]) -> None:
    progress = Progress(10)
    clock[0] += 1e6
    assert progress.hangs_s() is None
    progress.got_on()
    progress.rests()
    clock[0] += 1e6
    assert progress.hangs_s() is None


def test_who_works_hangs_after_what_is_always_granted(clock: list[float]) -> None:
    progress = Progress(10)
    progress.got_on()
    clock[0] += 10
    assert progress.hangs_s() is None
    clock[0] += 1
    assert progress.hangs_s() == 11
    progress.got_on()
    assert progress.hangs_s() is None


def test_where_work_takes_long_more_is_granted(clock: list[float]) -> None:
    progress = Progress(10)
    progress.got_on()
    clock[0] += 5
    progress.got_on()
    clock[0] += 5 * MULTIPLE
    assert progress.hangs_s() is None
    clock[0] += 1
    assert progress.hangs_s() == 5 * MULTIPLE + 1
