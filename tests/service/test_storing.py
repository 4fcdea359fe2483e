"""What is kept now, whose it is, and who is near their limit, as `lorry storage` prints it."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from lorry.cli import app
from lorry.storage.rows import CheckpointRow, RunRow
from lorry.storage.store import Store
from lorry.wire.ids import KeyId, ProjectId, RunId, TenantId
from lorry.wire.limits import Limits
from lorry.wire.types import LoraConfig

ALICE, BOB = TenantId("alice"), TenantId("bob")
RUN = RunRow(RunId("session-0123456789abcdef:train:0"), ALICE, "n", "m", LoraConfig(rank=4, seed=0), {}, 1.0, 1.0)
KEPT = CheckpointRow("a", RUN.id, ALICE, "training", "a", "f", 0, 600, "", 1.0, None)


@pytest.fixture
def asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    theirs = replace(RUN, id=RunId("run-b"), tenant=BOB, nonce="b", project=ProjectId("birds"), key=KeyId("key-b"))
    with closing(Store(tmp_path)) as store, store.transaction():
        for tenant, run in ((ALICE, RUN), (BOB, theirs)):
            store.tenant_made(tenant, 1.0)
            store.run_created(run)
        store.storage_priced(2 * 10**12, 1.0)
        for checkpoint in (
            KEPT,
            replace(KEPT, path="b", kind="sampler", size_bytes=300),
            replace(KEPT, path="over", expires_at=2.0),
            replace(KEPT, path="unnamed", ephemeral=True),
            replace(KEPT, path="c", run=theirs.id, tenant=BOB, size_bytes=100),
        ):
            store.checkpoint_saved(checkpoint)
        store.limits_set("everyone", Limits(stored_bytes=1000))
        store.limits_set("project:bob/birds", Limits(stored_bytes=0))

    def ask(*options: str) -> str:
        app(["storage", *options, "--data", str(tmp_path)], standalone_mode=False)
        return capfd.readouterr().out

    return ask


def of(printed: str) -> list[list[object]]:
    return [
        [*kept["of"].values(), kept["checkpoints"], kept["bytes"], kept["limit_bytes"]] for kept in json.loads(printed)
    ]


def test_it_is_told_by_whatever_is_asked_for(asked: Callable[..., str]) -> None:
    assert of(asked("--json")) == [["alice", 2, 900, 1000], ["bob", 1, 100, 1000]]
    assert of(asked("--json", "--by", "kind", "--tenant", "alice")) == [
        ["training", 1, 600, None],
        ["sampler", 1, 300, None],
    ]
    assert of(asked("--json", "--by", "tenant", "--by", "project")) == [
        ["alice", "default", 2, 900, None],
        ["bob", "birds", 1, 100, 0],
    ]
    assert of(asked("--json", "--by", "key")) == [["", 2, 900, None], ["key-b", 1, 100, None]]
    assert of(asked("--json", "--near")) == [["alice", 2, 900, 1000]]


def test_it_fits_a_terminal_and_ids_are_whole(asked: Callable[..., str]) -> None:
    table = asked("--by", "tenant", "--by", "run")
    assert all(len(line) <= 80 for line in table.splitlines())
    folded = "".join(line.split("│")[2].strip() for line in table.splitlines() if line.count("│") > 3)
    assert RUN.id in folded, "in two lines, where one has no room for it"
    lines = asked().splitlines()
    assert any("alice" in line and "900 B" in line and "90% of 1,000 B" in line for line in lines)
    assert any("sum" in line and "1,000 B" in line for line in lines)
    assert asked("--tenant", "nobody") == "Nothing is kept.\n"
