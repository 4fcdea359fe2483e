"""`lorry top`: what it shows is what the broker says, and it says so where the broker is away."""

import json
import os
import pty
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from lorry.cli import app
from lorry.top import away, frame, look
from lorry.wire.errors import ConnectionLostError
from lorry.wire.ids import ActorId
from lorry.wire.overview import ActorLoad, Overview
from lorry.wire.rates import Busy, busy, tokens_per_s
from tests.conftest import LORRY, MODEL, Server
from tests.scheduler.test_client_door import Serving

ACTOR = ActorLoad(ActorId("base#0"), "base", "cpu", "float32", 100.0, False, 3, 0, 0, 30.0, 20.0, 0, 200.0)
THEN = Overview(1000.0, 100.0, [ACTOR], [], 0, 0, [], {"train": 500, "sample": 10}, [])


@given(st.floats(0.5, 100), st.integers(0, 10**9))
def test_tokens_a_second_are_a_difference_by_a_difference(seconds: float, tokens: int) -> None:
    now = replace(THEN, at=THEN.at + seconds, tokens={"train": 500 + tokens, "sample": 10, "prefill": tokens})
    found = tokens_per_s([THEN], now)
    assert found["train"] == found["prefill"] == pytest.approx(tokens / (now.at - THEN.at))
    assert found["sample"] == 0


def test_a_broker_that_started_anew_counts_anew() -> None:
    now = replace(THEN, at=1010.0, counted_since=1005.0, tokens={"train": 50})
    assert tokens_per_s([THEN], now) == {}
    assert tokens_per_s([THEN, replace(now, at=1008.0, tokens={})], now) == {"train": 25.0}
    assert tokens_per_s([now], now) == tokens_per_s([], now) == {}


def test_an_actors_time_is_split_by_what_it_measured_last() -> None:
    assert busy([], ACTOR) == Busy(0.3, 0.2)
    assert busy([THEN], ACTOR) == Busy(0.3, 0.2), "it has not been measured since"
    later = replace(ACTOR, train_s=34.0, sample_s=20.5, measured_at=205.0)
    assert busy([THEN], later) == Busy(0.8, 0.1)
    assert busy([THEN], replace(later, started_at=195.0, train_s=5.0, sample_s=0.0)) == Busy(0.5, 0.0)
    assert busy([THEN], replace(later, measured_at=None)) is None


def shown(what: object) -> str:
    console = Console(width=80, emoji=False, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def test_a_frame_says_what_goes_on_and_what_is_wrong() -> None:
    said = shown(frame(replace(THEN, loading=["big"], trouble="the disk is full"), [replace(THEN, at=990.0)], 80))
    assert "Being loaded: big." in said
    assert "the disk is full" in said
    assert "train 30%" in said
    assert "idle" in said
    assert "00:16:40 UTC" in shown(away("nobody answers", THEN))


async def test_it_says_that_the_broker_is_away_and_comes_back_when_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConnectionLostError, match="no broker serves"):
        await look(None, None, tmp_path)
    for _ in range(2):  # each time at another address
        async with Serving(tmp_path) as service:
            (tmp_path / "operator.key").write_text(service.config.operator_key)
            seen = await look(None, None, tmp_path)
            assert [actor.base_model for actor in seen.actors] == ["m"]
        with pytest.raises(ConnectionLostError, match="no broker serves"):
            await look(None, None, tmp_path)


def test_a_frame_is_for_scripts_too(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    app(["top", "--once", "--json", "--data", str(server.data)], standalone_mode=False)
    (actor,) = json.loads(capfd.readouterr().out)["actors"]
    assert (actor["base_model"], actor["device"]) == (MODEL, "cpu")
    app(["top", "--once", "--data", str(server.data)], standalone_mode=False)
    assert f"{MODEL}#0" in capfd.readouterr().out


@dataclass(slots=True)
class Terminal:
    """What a program has written on it, and who writes there."""

    fd: int
    read: str = ""

    def until(self, text: str) -> None:
        while text not in self.read:
            self.read += os.read(self.fd, 65536).decode(errors="replace")


def test_q_ends_it_and_leaves_the_terminal_as_it_was(server: Server) -> None:
    ours, theirs = pty.openpty()
    before = subprocess.run(["stty", "-g"], stdin=theirs, capture_output=True, check=True).stdout
    command = [*LORRY, "top", "--data", str(server.data)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        terminal = Terminal(ours)
        terminal.until(f"{MODEL}#0")
        os.write(ours, b"xq")
        terminal.until("\x1b[?1049l")  # the screen from before
        assert process.wait() == 0
    assert subprocess.run(["stty", "-g"], stdin=theirs, capture_output=True, check=True).stdout == before
    os.close(ours)
    os.close(theirs)
