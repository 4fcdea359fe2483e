"""What the actors did with their devices, from readings that come when they come."""

import pytest

from lorry.bench.device import Reading, Split, split_between, splits_of
from lorry.bench.workload import Closed, Tenant, Train, Workload

from .stub import Stub, driven


def test_a_share_is_of_all_actors_time_between_two_readings_that_differ() -> None:
    readings = [Reading(0, 0, 0, 2), Reading(1, 0, 0, 2), Reading(5, 4, 1, 2), Reading(6, 4, 1, 2), Reading(7, 4, 3, 2)]
    assert splits_of(readings) == [Split(0, 5, 0.4, 0.1), Split(5, 7, 0.0, 0.5)]


def test_a_time_in_which_an_actor_was_replaced_is_told_of_no_other() -> None:
    readings = [Reading(0, 8, 0, 1), Reading(5, 1, 0, 1), Reading(10, 6, 0, 1), Reading(15, 9, 0, 2)]
    assert splits_of(readings) == [Split(5, 10, 1.0, 0.0)]


def test_only_the_measured_time_counts() -> None:
    readings = [Reading(5.0 * i, 1.0 * i * i, 0, 1) for i in range(5)]  # in 5 s 1, 3, 5 and 7 of training
    split = split_between(readings, 5, 16)
    assert split is not None and (split.start_s, split.end_s) == (5, 15)
    assert split.train == pytest.approx(8 / 10)
    assert split_between(readings, 6, 9) is None
    assert split_between([], 0, 9) is None


def test_actors_that_wait_are_seen_to_wait() -> None:
    busy = [Reading(float(i), 5.0 * (i // 5), 0, 1) for i in range(21)]  # heartbeats every 5 s, then nothing new
    readings = busy + [Reading(float(i), 20.0, 0, 1) for i in range(21, 61)]
    split = split_between(readings, 0, 60)
    assert split is not None and split.train == pytest.approx(20 / 60)
    splits = splits_of(readings)
    assert [split.train for split in splits[:4]] == [1.0] * 4
    assert splits[-1].end_s > 50 and {split.train for split in splits[4:]} == {0.0}


def test_somebody_looks_every_second_until_the_last_request_has_ended() -> None:
    looked = list[float]()

    async def look(at_s: float) -> None:
        looked.append(at_s)

    workload = Workload("w", "m", [Tenant("a", [Train()], Closed())], warm_up_s=0, duration_s=3)
    driven(workload, Stub(lambda name, n: 2.0), look=look)
    assert looked[:4] == pytest.approx([0, 1, 2, 3])
