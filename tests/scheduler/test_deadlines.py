"""What is not over by its client's deadline is ended, with the reason, and in nobody else's way."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorry
from lorry.client.connection import open_connection
from lorry.scheduler.planning.deadlines import Deadlines
from lorry.wire.client_messages import Submit
from lorry.wire.errors import DeadlineExceededError, InvalidRequestError
from lorry.wire.ids import FutureId, LaneId, future_id

from .test_client_door import DATUM, Serving

PROMPT, ONE = lorry.ModelInput.from_ints([1]), lorry.SamplingParams(max_tokens=1)
ROWS = 64
"""What the scripted actor samples at the same time."""


@given(st.lists(st.tuples(st.sampled_from(["add", "over", "pass"]), st.integers(0, 9), st.floats(0, 100))))
def test_each_is_told_once_when_its_time_has_come_and_never_after_it_is_over(
    steps: list[tuple[str, int, float]],
) -> None:
    deadlines, expected, now = Deadlines(), dict[FutureId, float](), 0.0
    for step, number, at in steps:
        future = FutureId(f"run:{number}")
        if step == "add" and future not in expected:
            deadlines.add(future, at)
            expected[future] = at
        elif step == "over":
            deadlines.over(future)
            expected.pop(future, None)
        elif step == "pass":
            now = max(now, at)
            due = sorted((at, each) for each, at in expected.items() if at <= now)
            most = number if number > 5 else len(due)
            assert deadlines.passed(now, most) == [each for _, each in due[:most]]
            for _, each in due[:most]:
                del expected[each]
        assert deadlines.next_at() == min(expected.values(), default=None)


def test_what_is_over_takes_no_room() -> None:
    deadlines = Deadlines()
    for number in range(10_000):
        deadlines.add(FutureId(f"run:{number}"), 1e9 + number)
        deadlines.over(FutureId(f"run:{number}"))
    assert len(deadlines._by_time) < 100  # pyright: ignore[reportPrivateUsage]


async def test_what_waits_ends_with_the_reason_and_those_behind_it_go_on(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        sampler = await client.create_sampling_client_async(base_model="m")
        full = [sampler.sample(PROMPT, 1, ONE) for _ in range(ROWS)]
        await client.create_sampling_client_async(base_model="m")  # what was asked before is in the journal, too
        with lorry.deadline(0.2), lorry.deadline(60):  # the earlier one counts
            late = sampler.sample(PROMPT, 1, ONE)
        behind = sampler.sample(PROMPT, 1, ONE)
        said = r" was not over 0\.\d+ s after it was accepted: it waits for its turn"
        with pytest.raises(DeadlineExceededError, match=said):
            await late
        service.may_work.set()
        for future in (*full, behind):
            await future


async def test_many_that_are_late_at_once_all_end(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        sampler = await client.create_sampling_client_async(base_model="m")
        full = [sampler.sample(PROMPT, 1, ONE) for _ in range(ROWS)]
        with lorry.deadline(0.3):
            late = [sampler.sample(PROMPT, 1, ONE) for _ in range(500)]
        behind = sampler.sample(PROMPT, 1, ONE)
        for future in late:
            with pytest.raises(DeadlineExceededError, match=r"not over 0\.\d+ s after it was accepted: "):
                await future
        service.may_work.set()
        for future in (*full, behind):
            await future


async def test_a_runs_request_that_waits_ends_and_the_run_goes_on(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as alice:
        service.may_work.set()
        training = await lorry.ServiceClient(alice).create_lora_training_client_async("m", rank=4)
        lane = LaneId(training.model_id)
        futures = {seq: alice.expect(future_id(lane, seq)) for seq in range(3)}
        for seq, timeout_s in ((2, None), (1, 0.2)):
            alice.submit(Submit(alice.next_request(), lane, seq, "optim_step", timeout_s=timeout_s), b"", futures[seq])
        with pytest.raises(DeadlineExceededError, match="goes on with request 0, which has not arrived"):
            await futures[1]
        alice.submit(Submit(alice.next_request(), lane, 0, "optim_step"), b"", futures[0])
        await futures[0]
        await futures[2]
        assert service.states(training.model_id) == ["done", "failed", "done"]


async def test_a_deadline_outlives_the_broker(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as alice:
        key = service.key
        client = lorry.ServiceClient(alice)
        training = await client.create_lora_training_client_async("m", rank=4)
        lane = LaneId(training.model_id)
        submit = Submit(alice.next_request(), lane, 1, "forward_backward", timeout_s=5.0)
        acknowledged = alice.submit(submit, b"", alice.expect(future_id(lane, 1)))  # 0 never comes
        await acknowledged.wait()
        assert service.states(lane) == ["queued"], "or the machine is so slow that this shows nothing"
    async with Serving(tmp_path) as again, open_connection(again.address, key) as alice:
        with pytest.raises(DeadlineExceededError, match="goes on with request 0, which has not arrived"):
            await alice.watch(future_id(lane, 1))


async def test_what_can_be_no_timeout_is_refused_and_what_is_too_late_is_not_sent(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as alice:
        service.may_work.set()
        training = await lorry.ServiceClient(alice).create_lora_training_client_async("m", rank=4)
        lane = LaneId(training.model_id)
        for seq, wrong in enumerate((0.0, -1.0, 1e9, float("nan"))):
            future = alice.expect(future_id(lane, seq))
            alice.submit(Submit(alice.next_request(), lane, seq, "forward_backward", timeout_s=wrong), b"", future)
            with pytest.raises(InvalidRequestError, match=r"timeout_s is .*expected seconds above 0, up to 2,592,000"):
                await future
        training = await lorry.ServiceClient(alice).create_lora_training_client_async("m", rank=4)
        with lorry.deadline(0), pytest.raises(DeadlineExceededError, match="nothing was sent"):
            training.forward_backward([DATUM], "cross_entropy")
        await training.forward_backward([DATUM], "cross_entropy")
        assert service.states(training.model_id) == ["done"]
