"""Which deaths end a deployment, and which cost it a pause."""

from collections.abc import Callable
from contextlib import suppress

import anyio
import pytest

from lorry import serve
from lorry.serve import CONFIGURATION_EXIT, ChildFailedError, _Child, _keep_alive


class EndOfLivesError(Exception):
    pass


class Lives:
    """What a child's processes do, one after the other; its supervisor ends after the last."""

    def __init__(self, *lives: tuple[bool, int]) -> None:
        self.left = list(lives)
        self.pauses: list[float] = []

    async def run(self, child: _Child) -> int:
        if not self.left:
            raise EndOfLivesError
        is_ready, code = self.left.pop(0)
        if is_ready:
            child.ready.set()
            child.ready_at = anyio.current_time()
        return code

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


@pytest.fixture
def supervise(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Lives]:
    def supervise(*lives: tuple[bool, int]) -> Lives:
        those = Lives(*lives)
        monkeypatch.setattr(serve, "_run", those.run)
        monkeypatch.setattr(serve.anyio, "sleep", those.sleep)

        async def keep() -> None:
            with suppress(EndOfLivesError):
                await _keep_alive(_Child("child", [], {}, 5.0))

        anyio.run(keep)
        return those

    return supervise


def test_what_was_ready_once_is_started_again_for_ever(supervise: Callable[..., Lives]) -> None:
    lives = supervise(*[(True, -9)] * 20, (False, CONFIGURATION_EXIT), (True, 1))
    assert lives.left == []
    assert lives.pauses == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] + [10] * 12


def test_after_a_long_life_there_is_no_pause(supervise: Callable[..., Lives], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_SOON_S", -1.0)
    assert supervise(*[(True, -9)] * 3).pauses == [0, 0, 0]


async def test_an_actor_without_a_broker_to_join_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = _Child("broker", [], {}, 5.0)
    lives = Lives(*[(False, 1)] * 7)
    died = anyio.Event()

    async def run(child: _Child) -> int:
        died.set()
        return await lives.run(child)

    async def keep() -> None:
        with pytest.raises(ChildFailedError, match="actor ended 6 times before it was ready"):
            await _keep_alive(_Child("actor", [], {}, 5.0, needs=broker))

    monkeypatch.setattr(serve, "_run", run)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep)
        await died.wait()
        await anyio.wait_all_tasks_blocked()
        assert len(lives.left) == 6, "it is not started again before there is one"
        monkeypatch.setattr(serve.anyio, "sleep", lives.sleep)
        broker.ready.set()
    assert lives.left == [], "and the death that was not its fault is not counted"


def test_what_never_gets_ready_ends_the_deployment_with_the_reason(supervise: Callable[..., Lives]) -> None:
    with pytest.raises(ChildFailedError, match="child ended 6 times before it was ready"):
        supervise(*[(False, 1)] * 9)
    with pytest.raises(ChildFailedError, match="child cannot start"):
        supervise((False, CONFIGURATION_EXIT))
