"""`lorry status` tells how an actor's time was split, from a real database."""

import json
from contextlib import closing
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lorry.cli import app
from lorry.reports import print_status
from lorry.storage.rows import ActorRow, CommandRow, ResultRow
from lorry.storage.store import Store
from lorry.wire.actor_messages import ActorPing
from lorry.wire.client_messages import CommandArguments
from lorry.wire.codec import encode
from lorry.wire.errors import NotFoundError
from lorry.wire.ids import ActorId, FutureId, LaneId, TenantId

ACTOR = ActorId("base#0")


def lines_of_actor(folder: Path) -> list[str]:
    output = StringIO()
    print_status(Console(file=output, width=200), folder)
    lines = output.getvalue().splitlines()
    (line,) = [line for line in lines if ACTOR in line]
    at = lines.index(line)
    return [word.strip() for row in lines[at : at + 2] for word in row.strip("│").split("│")]


def test_the_time_spent_sampling_is_shown_beside_its_share(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.transaction():
        store.actor_started(ActorRow(ACTOR, "base", 1, "cpu", "float32", 16, 0.25, "ready", 1.0))
    assert lines_of_actor(tmp_path)[3:6] == ["", "", "16"]
    assert lines_of_actor(tmp_path)[10:12] == ["of 25%", ""]
    with store.transaction():
        store.actor_measured(ACTOR, ActorPing(train_s=30.0, sample_s=20.0, swaps=3))
    assert lines_of_actor(tmp_path)[3:6] == ["50.0", "40%", "16"]
    assert lines_of_actor(tmp_path)[10:12] == ["of 25%", "3"]


def test_the_same_is_told_to_programs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Store(tmp_path)) as store, store.transaction():
        store.actor_started(ActorRow(ACTOR, "base", 1, "cpu", "float32", 16, 0.25, "ready", 1.0))
        store.tenant_made(TenantId("alice"), 1.0)
        lane = LaneId("run-1")
        future = FutureId(f"{lane}:0")
        row = CommandRow(future, lane, 0, "sample", TenantId("alice"), "base", 1, 1, CommandArguments())
        store.command_accepted(row, b"", b"", 1.0)
        error = encode(NotFoundError("it is gone").info)
        store.command_finished(ResultRow(future, error, None), "failed", None, [], 2.0)
    app(["status", "--json", "--data", str(tmp_path)], standalone_mode=False)
    found = json.loads(capfd.readouterr().out)
    assert found["actors"][0]["id"] == ACTOR
    assert found["failures"][0]["error"]["code"] == "NotFoundError"
    assert found["tenants"][0]["id"] == "alice"
    assert found["runs"] == found["queues"] == []


def test_errors_are_printed_as_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[red]:smile:[b]" / ("long" * 50)
    with pytest.raises(SystemExit):
        app(["status", "--data", str(folder)], standalone_mode=False)
    (line,) = capfd.readouterr().err.splitlines()
    assert str(folder) in line
