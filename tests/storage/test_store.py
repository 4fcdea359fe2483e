"""A real SQLite file: what was recorded is there after a restart, once, and keys are never stored."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlite_utils import Database

from lorry.scheduler.registry import Registry
from lorry.scheduler.restore_points import fallen_back, moved_on
from lorry.storage.checkpoints import delete_folder
from lorry.storage.connection import FILE
from lorry.storage.keys import key_hash
from lorry.storage.reports import actors, usage
from lorry.storage.rows import (
    CheckpointRow,
    CommandRow,
    CommandState,
    ResultRow,
    RunRow,
    SamplerRow,
    UsageEntry,
    UsedSeq,
)
from lorry.storage.schema import migrations
from lorry.storage.store import Store
from lorry.storage.writer import Writer
from lorry.wire.client_messages import CommandArguments
from lorry.wire.codec import encode
from lorry.wire.ids import FutureId, LaneId, RunId, SamplerId, TenantId
from lorry.wire.tasks import background_tasks
from lorry.wire.types import LoraConfig

ALICE = TenantId("alice")
RUN = RunRow(RunId("run-1"), ALICE, "nonce", "base", LoraConfig(rank=4, seed=7), {"note": "é"}, 1.0, 1.0)


def command(seq: int, kind: str = "forward_backward") -> CommandRow:
    lane = LaneId(RUN.id)
    return CommandRow(
        FutureId(f"{lane}:{seq}"), lane, seq, kind, ALICE, "base", 10, 1, CommandArguments(name="n"), accepted_at=1.0
    )  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.create_key(ALICE, 1.0)
    store.run_created(RUN)
    return store


def finish(store: Store, seq: int, error: bytes | None = None) -> None:
    future = command(seq).future
    usage = [] if error else [UsageEntry(future, "train", ALICE, RUN.id, "base", 10, 3, 30)]
    with store.transaction():
        state: CommandState = "failed" if error else "done"
        store.command_finished(ResultRow(future, error, None if error else b"result"), state, None, usage, 2.0)


def test_a_run_is_read_back_as_it_was_written(store: Store, tmp_path: Path) -> None:
    assert Store(tmp_path).runs() == [RUN]


def test_an_older_database_keeps_its_actors(tmp_path: Path) -> None:
    old = Database(tmp_path / FILE)
    migrations.apply(old, stop_before="m004_split_of_busy_time")
    old.table("actors").insert({"id": "base#0", "state": "stopped", "busy_s": 7.0, "swaps": 2, "started_at": 1.0})
    old.close()
    (actor,) = actors(Store(tmp_path))
    assert (actor["id"], actor["swaps"], actor["train_s"]) == ("base#0", 2, None)


def test_a_key_is_stored_as_its_hash_alone(store: Store, tmp_path: Path) -> None:
    key = store.create_key(ALICE, 1.0)
    found = store.key_with(key_hash(key))
    assert found is not None
    assert found.tenant == ALICE
    assert store.key_with(key_hash(key + "x")) is None
    for file in tmp_path.iterdir():
        assert key.encode() not in file.read_bytes()


def test_a_command_is_accepted_once(store: Store) -> None:
    assert store.command_accepted(command(0), b"payload", b"digest", 1.0) is None
    again = store.command_accepted(command(0, "optim_step"), b"another", b"other", 1.0)
    assert again == UsedSeq("forward_backward", "queued", b"digest")
    assert store.payload(command(0).future) == b"payload"


def test_what_is_queued_comes_back_in_order_after_a_restart(store: Store, tmp_path: Path) -> None:
    for seq in (0, 1, 2):
        store.command_accepted(command(seq), b"", b"", 1.0)
    finish(store, 0)
    again = Store(tmp_path)
    assert again.queued_commands() == [command(1), command(2)]
    assert again.finished_counts() == {LaneId(RUN.id): (1, 0)}
    assert again.result(command(0).future) == ResultRow(command(0).future, None, b"result")


def test_a_completion_is_all_or_nothing(store: Store) -> None:
    store.command_accepted(command(0), b"", b"", 1.0)
    finish(store, 0)
    with pytest.raises(Exception, match="UNIQUE"):
        finish(store, 0)
    assert [row.tokens for row in usage(store, ALICE)] == [10]


def test_a_replay_has_what_changed_the_state_and_nothing_else(store: Store) -> None:
    kinds = ["forward_backward", "forward", "optim_step", "save_state", "forward_backward", "optim_step"]
    for seq, kind in enumerate(kinds):
        store.command_accepted(command(seq, kind), b"p", b"", 1.0)
        finish(store, seq, error=b"failed" if seq == 4 else None)
    assert [row.seq for row in store.replayable_commands(RUN.id, -1, 10)] == [0, 2, 5]
    assert [row.seq for row in store.replayable_commands(RUN.id, 3, 10)] == [5]


def test_a_payload_is_kept_until_two_saved_states_cover_it(store: Store) -> None:
    for seq in range(6):
        store.command_accepted(command(seq), b"p", b"", 1.0)
        finish(store, seq)

    def kept() -> list[int]:
        return [seq for seq in range(6) if store.payload(command(seq).future)]

    run = moved_on(RUN, "/first", 2, 1.5)
    store.restore_points_set(run)
    assert kept() == [0, 1, 2, 3, 4, 5] and store.runs() == [run] and run.replay_s == 1.5
    run = moved_on(run, "/second", 4)
    store.restore_points_set(run)
    assert kept() == [3, 4, 5] and store.runs() == [run]
    assert store.folders_in_use() == {"/first", "/second"}
    older = fallen_back(run)
    assert older is not None and (older.restore_folder, older.restore_seq) == ("/first", 2)
    assert fallen_back(older) is None


def test_a_saved_state_that_comes_too_late_changes_nothing() -> None:
    run = moved_on(moved_on(RUN, "/first", 2), "/second", 4)
    assert moved_on(run, "/late", 3) == moved_on(run, "/again", 4) == run


def test_a_replay_repeats_what_dropped_a_gradient(store: Store) -> None:
    for seq, kind in enumerate(["forward_backward", "optim_step"]):
        store.command_accepted(command(seq, kind), b"p", b"", 1.0)
    finish(store, 0)
    with store.transaction():
        store.command_finished(ResultRow(command(1).future, b"not finite", None), "discarded", None, [], 2.0)
    assert [(row.seq, row.state) for row in store.replayable_commands(RUN.id, -1, 10)] == [
        (0, "done"),
        (1, "discarded"),
    ]


def test_a_name_that_was_taken_again_is_not_deleted_for_the_one_that_had_it(store: Store) -> None:
    old = CheckpointRow("tinker://x", RUN.id, ALICE, "sampler", "x", "old", 0, 1, "", created_at=1.0, expires_at=2.0)
    new = replace(old, folder="new", expires_at=None)
    registry = Registry(["base"], lambda: 3.0)
    for checkpoint in (old, new):
        store.checkpoint_saved(checkpoint)
        registry.add_checkpoint(checkpoint)
    store.checkpoint_deleted(old, 3.0)
    registry.remove_checkpoint(old)
    assert store.checkpoints() == [new]
    assert registry.readable(ALICE, "tinker://x") == new


def a_load(seq: int, folder: str) -> CommandRow:
    return replace(command(seq, "load_state"), folder=folder)


def test_a_folder_is_in_use_as_long_as_anything_may_need_it(store: Store) -> None:
    for seq, folder in enumerate(["loaded", "refused", "waiting"]):
        store.command_accepted(a_load(seq, folder), b"", b"", 1.0)
    finish(store, 0)
    finish(store, 1, error=b"refused")
    sampler = SamplerRow(SamplerId("s"), ALICE, "n", "base", "tinker://x", 1.0, folder="sampled")
    store.sampler_created(sampler)
    assert store.folders_in_use() == {"loaded", "waiting", "sampled"}
    first = moved_on(RUN, "newest", 0)
    store.restore_points_set(first)
    assert store.folders_in_use() == {"loaded", "waiting", "sampled", "newest"}
    store.restore_points_set(moved_on(first, "newest", 1))
    assert store.folders_in_use() == {"newest", "waiting", "sampled"}
    assert store.folder_is_in_use("waiting") and not store.folder_is_in_use("loaded")


def test_a_sampler_keeps_its_weights_until_nobody_has_used_it_for_long(store: Store) -> None:
    for name, folder in (("named", "kept"), ("idle", "gone"), ("base", None)):
        store.sampler_created(SamplerRow(SamplerId(name), ALICE, name, "base", None, 1.0, folder=folder))
    store.checkpoint_saved(
        CheckpointRow("tinker://x", RUN.id, ALICE, "sampler", "x", "kept", 0, 1, "", created_at=1.0, expires_at=None)
    )
    store.command_accepted(
        replace(command(0, "sample"), lane=LaneId("idle"), future=FutureId("idle:0")), b"", b"", 50.0
    )
    assert store.samplers_expired(50.0) == []
    assert store.samplers_expired(50.1) == [], "something waits for it"
    with store.transaction():
        store.command_finished(ResultRow(FutureId("idle:0"), None, b""), "done", None, [], 51.0)
    assert store.samplers_expired(50.1) == ["idle"]
    assert {row.id for row in store.samplers()} == {"named", "base"}


def unnamed(seq: int, at: float) -> CheckpointRow:
    path = f"tinker://{RUN.id}/sampler_weights/_{seq}"
    return CheckpointRow(path, RUN.id, ALICE, "sampler", "", f"f{seq}", seq, 1, "", at, None, ephemeral=True)


def test_weights_without_a_name_go_when_newer_ones_are_used_instead(store: Store) -> None:
    for seq in range(6):
        at = 100.0 + seq
        store.checkpoint_saved(unnamed(seq, at))
        sampler = SamplerRow(SamplerId(f"s{seq}"), ALICE, f"s{seq}", "base", f"tinker://{seq}", at, folder=f"f{seq}")
        store.sampler_created(sampler)
    store.checkpoint_saved(replace(unnamed(7, 1.0), path="tinker://named", ephemeral=False))
    asked = replace(command(0, "sample"), lane=LaneId("s2"), future=FutureId("s2:0"))
    store.command_accepted(asked, b"", b"", 104.0)
    assert store.samplers_outlived(RUN.id, 7, 200.0) == ([], [])
    assert store.samplers_outlived(RUN.id, 3, 100.0) == ([], []), "all of them were asked since"
    assert store.samplers_outlived(RUN.id, 3, 101.0) == (["s0"], [unnamed(0, 100.0)])
    assert store.samplers_outlived(RUN.id, 3, 200.0) == (["s1"], [unnamed(1, 101.0)]), "s2 was asked after s3 was made"
    assert {row.id: (row.folder, row.outlived) for row in store.samplers() if row.outlived} == {
        SamplerId("s0"): (None, True),
        SamplerId("s1"): (None, True),
    }
    assert not {"f0", "f1"} & store.folders_in_use()
    assert store.samplers_outlived(RUN.id, 1, 200.0) == (["s3", "s4"], [unnamed(3, 103.0), unnamed(4, 104.0)])
    assert store.folders_in_use() >= {"f2", "f5", "f7"}, "something waits for s2, s5 is the newest, f7 has a name"
    assert set(store.samplers_expired(103.9)) == {"s0", "s1", "s3"}


def test_an_older_journal_learns_which_folders_its_loads_meant(tmp_path: Path) -> None:
    old = Database(tmp_path / FILE)
    migrations.apply(old, stop_before="m005_names_are_resolved_once")
    old.table("tenants").insert({"id": ALICE, "created_at": 1.0})
    old.table("runs").insert({"id": RUN.id, "tenant": ALICE, "nonce": "n", "restore_seq": -1})
    path = "tinker://run/weights/x"
    old.table("checkpoints").insert({"path": path, "run": RUN.id, "tenant": ALICE, "folder": "at-x"})
    arguments = encode(CommandArguments(path=path))
    row = {"future": "run:0", "lane": RUN.id, "seq": 0, "kind": "load_state", "state": "done", "arguments": arguments}
    old.table("commands").insert(row)
    old.table("commands").insert(row | {"future": "run:1", "seq": 1, "state": "queued"})
    for name, weights in (("s", path), ("lost", "tinker://run/sampler_weights/_5"), ("base", None)):
        old.table("samplers").insert(
            {"id": name, "tenant": ALICE, "nonce": name, "model_path": weights, "created_at": 1.0}, alter=True
        )
    old.close()
    store = Store(tmp_path)
    found = {sampler.id: sampler.folder for sampler in store.samplers()}
    assert found == {"s": "at-x", "base": None}, "without its weights a sampler must not become the base model's"
    assert store.rows("SELECT folder, digest FROM commands ORDER BY seq") == [
        {"folder": "at-x", "digest": None},
        {"folder": None, "digest": None},
    ]


async def test_one_commit_covers_all_that_came_in_during_the_one_before(store: Store) -> None:
    commits: list[int] = []
    original = store.transaction

    def counted():
        commits.append(1)
        return original()

    store.transaction = counted  # type: ignore[method-assign]
    writer = Writer(store)
    async with background_tasks() as tasks:
        order: list[int] = []
        for seq in range(100):
            writer.write(
                lambda s, seq=seq: s.command_accepted(command(seq), b"", b"", time.time()),
                lambda _, seq=seq: order.append(seq),
            )
        tasks.start_soon(writer.run)
        await writer.write_and_wait(lambda s: None)
        assert order == list(range(100))
        assert len(commits) <= 2


async def test_nothing_is_acknowledged_after_the_database_refused_a_commit(store: Store) -> None:
    writer = Writer(store)
    acknowledged: list[str] = []
    writer.write(lambda s: s.run_created(RUN), lambda _: acknowledged.append("a duplicate"))
    with pytest.raises(RuntimeError, match="the database refused"):
        await writer.run()
    assert acknowledged == []


def test_no_row_however_wrong_deletes_outside_the_checkpoints(tmp_path: Path) -> None:
    root, outside = tmp_path / "checkpoints", tmp_path / "precious"
    (root / "run" / "one").mkdir(parents=True)
    outside.mkdir()
    for folder in (outside, root / ".." / "precious", root):
        with pytest.raises(ValueError, match="is not below"):
            delete_folder(root, folder)
    delete_folder(root, root / "run" / "one")
    assert outside.exists() and not (root / "run" / "one").exists()
