"""What operators see and change from the command line, beside a service and on a folder that nobody serves."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from anyio import to_thread
from hypothesis import given
from hypothesis import strategies as st

import lorry
from lorry.cli import app
from lorry.selection import Selection, seconds_of, selected
from lorry.storage.lock import sole_writer
from lorry.storage.rows import CheckpointRow, CommandRow, RunRow, SamplerRow
from lorry.storage.store import Store
from lorry.wire.client_messages import CommandArguments
from lorry.wire.ids import FutureId, LaneId, RunId, SamplerId, TenantId
from lorry.wire.types import LoraConfig
from tests.conftest import MODEL, Server

ALICE = TenantId("alice")
RUN = RunId("session-0123456789abcdef:train:0")


def told(capfd: pytest.CaptureFixture[str], data: Path, *words: str) -> str:
    app([*words, "--data", str(data)], standalone_mode=False)
    return capfd.readouterr().out


def accept(store: Store, lane: str, seq: int) -> None:
    future = FutureId(f"{lane}:{seq}")
    row = CommandRow(future, LaneId(lane), seq, "forward_backward", ALICE, "base", 1200, 1, CommandArguments())
    store.command_accepted(row, b"", b"", 1.0)


def test_where_nobody_serves_the_journal_says_what_waits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Store(tmp_path)) as store, store.transaction():
        for seq in range(3):
            accept(store, RUN, seq)
    shown = told(capfd, tmp_path, "jobs", "--limit", "2")
    assert shown.startswith("No broker serves this data.")
    assert "session-0123456789abcdef:train:0:1" in shown
    assert "3 not over, 1 of them not shown" in shown
    found = json.loads(told(capfd, tmp_path, "jobs", "--json", "--newest", "--limit", "1"))
    assert (found["is_served"], found["total"]) == (False, 3)
    assert found["jobs"][0]["future"].endswith(":2")
    assert told(capfd, tmp_path, "jobs", "--tenant", "bob").endswith("0 not over.\n")


def test_beside_a_service_its_broker_is_asked(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    assert json.loads(told(capfd, server.data, "jobs", "--json", "--tenant", "nobody"))["is_served"]


# Runs and checkpoints -----------------------------------------------------------------------------------------------


def checkpoint(data: Path, name: str, created_at: float = 1.0) -> CheckpointRow:
    folder = data / "checkpoints" / RUN / "training" / f"{name}.1"
    folder.mkdir(parents=True, exist_ok=True)
    path = f"tinker://{RUN}/weights/{name}"
    return CheckpointRow(path, RUN, ALICE, "training", name, str(folder), 1, 2**20, "", created_at, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a run of alice's, and its checkpoints a, b and c."""
    with closing(Store(tmp_path)) as store, store.transaction():
        store.tenant_made(ALICE, 1.0)
        store.run_created(RunRow(RUN, ALICE, "nonce", "base", LoraConfig(rank=8, seed=0), {}, 1.0, 1.0))
        for name in "abc":
            store.checkpoint_saved(checkpoint(tmp_path, name))
    return tmp_path


def deeds(data: Path) -> list[tuple[str, str, str]]:
    with closing(Store(data)) as store:
        return [(event.by, event.event, event.subject[-1]) for event in store.audit()]


def test_an_operator_changes_checkpoints_of_a_folder_that_nobody_serves(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (f"tinker://{RUN}/weights/{name}" for name in "abc")
    with closing(Store(folder)) as store, store.transaction():  # which samples b still
        b_folder = str(folder / "checkpoints" / RUN / "training" / "b.1")
        store.sampler_created(SamplerRow(SamplerId("s"), ALICE, "n", "base", b, 1.0, folder=b_folder))
    told(capfd, folder, "checkpoints", "publish", a, c)
    told(capfd, folder, "checkpoints", "unpublish", a)
    told(capfd, folder, "checkpoints", "ttl", c, "--in", "1d")
    assert told(capfd, folder, "checkpoints", "rm", a, b, "--yes").splitlines() == [f"{a}: deleted.", f"{b}: deleted."]
    (left,) = json.loads(told(capfd, folder, "checkpoints", "ls", "--json"))
    assert (left["path"], left["public"], left["expires_at"] is not None) == (c, True, True)
    assert {each.name for each in (folder / "checkpoints" / RUN / "training").iterdir()} == {"b.1", "c.1"}
    assert deeds(folder) == [
        ("operator", "checkpoint_published", "a"),
        ("operator", "checkpoint_published", "c"),
        ("operator", "checkpoint_unpublished", "a"),
        ("operator", "checkpoint_expiry_set", "c"),
        ("operator", "checkpoint_deleted", "a"),
        ("operator", "checkpoint_deleted", "b"),
    ]


def test_nothing_is_deleted_that_was_not_meant(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = f"tinker://{RUN}/weights/a"
    before = told(capfd, folder, "checkpoints", "ls", "--json")
    for words in (("rm",), ("rm", a, "--run", RUN), ("ttl", a), ("ttl", a, "--in", "9"), ("ttl", a, "--in", "0s")):
        with pytest.raises(typer.BadParameter):
            app(["checkpoints", *words, "--data", str(folder)], standalone_mode=False)
    with pytest.raises(SystemExit):
        app(["checkpoints", "rm", a, "tinker://x", "--yes", "--data", str(folder)], standalone_mode=False)
    assert "there is no checkpoint 'tinker://x'" in capfd.readouterr().err
    monkeypatch.setattr("typer.confirm", partial(_refuse, said := []))
    with pytest.raises(typer.Abort):
        app(["checkpoints", "rm", "--older-than", "1d", "--data", str(folder)], standalone_mode=False)
    assert said == ["Delete 3 checkpoints, 3.0 MiB?"]
    capfd.readouterr()
    with sole_writer(folder), pytest.raises(SystemExit):  # a broker that has not said yet where it listens
        app(["checkpoints", "rm", a, "--yes", "--data", str(folder)], standalone_mode=False)
    capfd.readouterr()
    assert told(capfd, folder, "checkpoints", "ls", "--json") == before
    assert deeds(folder) == []
    assert (
        told(capfd, folder, "checkpoints", "rm", "--older-than", "1d", "--yes", "--tenant", "alice").count("deleted")
        == 3
    )


def _refuse(said: list[str], text: str, abort: bool) -> None:
    said.append(text)
    raise typer.Abort


moments = st.floats(0, 1e6)


@given(
    st.lists(st.tuples(st.sampled_from("xy"), st.sampled_from("xy"), moments, st.none() | moments, st.booleans())),
    st.builds(Selection, st.none() | st.just("x"), st.none() | st.just("y"), st.just("training"), st.none() | moments),
    moments,
)
def test_what_is_selected_is_all_that_is_meant(rows: Sequence[Any], wanted: Selection, now: float) -> None:
    like = CheckpointRow("", RUN, ALICE, "training", "n", "", 1, 1, "", 1.0, None)
    made = [
        replace(
            like, path=str(i), tenant=TenantId(tenant), run=RunId(run), created_at=at, expires_at=end, ephemeral=unnamed
        )
        for i, (tenant, run, at, end, unnamed) in enumerate(rows)
    ]
    found = selected(made, wanted, now)
    for row in made:
        meant = not row.ephemeral and not (row.expires_at is not None and row.expires_at <= now)
        meant &= wanted.tenant is None or row.tenant == wanted.tenant
        meant &= wanted.run is None or row.run == wanted.run
        meant &= wanted.older_than is None or now - row.created_at > wanted.older_than
        assert (row in found) == meant
    assert [row.created_at for row in found] == sorted((row.created_at for row in found), reverse=True)


def test_a_duration_has_a_unit() -> None:
    assert [seconds_of(text) for text in ("90s", "1.5min", "2h", "30d")] == [90, 90, 7200, 30 * 86400]
    for wrong in ("", "7", "d", "-1d", "1 d", "1w", "1e3s"):
        with pytest.raises(ValueError, match="expected a number and a unit"):
            seconds_of(wrong)


async def test_beside_a_service_runs_say_where_they_are_and_checkpoints_end_at_once(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    async def ask(*words: str) -> str:
        return await to_thread.run_sync(partial(told, capfd, server.data, *words))

    async with lorry.connect(server.address, api_key=server.new_key("seen")) as client:
        training = await client.create_lora_training_client_async(MODEL, rank=4)
        saved = [(await training.save_state(name)).path for name in ("one", "two")]
        rest = client.create_rest_client()
        (run,) = json.loads(await ask("runs", "--json", "--tenant", "seen"))
        assert (run["id"], run["home"], run["queued"]) == (training.model_id, f"{MODEL}#0", 0)
        assert run["restore_seq"] == 1
        assert training.model_id in await ask("runs", "--tenant", "seen", "--model", MODEL)
        await ask("checkpoints", "publish", saved[0])
        await ask("checkpoints", "ttl", saved[0], "--in", "2h")
        one, two = sorted(await rest.list_checkpoints_async(), key=lambda each: each.tinker_path)
        assert (one.public, two.public) == (True, False)
        assert one.expires_at is not None
        await ask("checkpoints", "ttl", saved[0], "--never")
        assert "deleted" in await ask("checkpoints", "rm", "--tenant", "seen", "--yes")
        assert await rest.list_checkpoints_async() == []
        events = json.loads(await ask("audit", "--tenant", "seen", "--json"))
        assert [event["event"] for event in events if event["by"] == "operator"] == [
            "checkpoint_published",
            *["checkpoint_expiry_set"] * 2,
            *["checkpoint_deleted"] * 2,
        ]
