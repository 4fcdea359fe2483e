"""A run's state in host memory, on disk and back: bit for bit, within a budget, whatever the disk does."""

from collections.abc import Sequence
from math import inf
from pathlib import Path

import pytest
import torch

from lorry.actors.adapters import checkpoints, folders
from lorry.actors.adapters.behind import SnapshotPolicy
from lorry.actors.adapters.residents import Residents
from lorry.actors.adapters.snapshots import Snapshot, restore_state, write_snapshot
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.training.trainer import Trainer
from lorry.wire.actor_messages import AdapterState, Item, Outcome, SnapshotFailed, SnapshotTaken
from lorry.wire.codec import decode, encode
from lorry.wire.commands import CommandKind, OptimStepInput
from lorry.wire.errors import CheckpointError
from lorry.wire.ids import FutureId
from lorry.wire.types import AdamParams, ForwardBackwardOutput, LoraConfig

from .models import tiny_qwen3, tiny_qwen3_moe
from .placing import exactly
from .workshop import Family, Workshop, job, request

STEP = encode(OptimStepInput(AdamParams(learning_rate=1e-2)))
ALWAYS, NEVER = SnapshotPolicy(0, inf), SnapshotPolicy(inf, inf)


class Desk:
    """A trainer whose runs' snapshots go to `folder`. The broker answers each at once, unless it is `silent`."""

    def __init__(
        self,
        folder: Path,
        host_bytes: int = 2**40,
        policy: SnapshotPolicy = NEVER,
        slots: int = 2,
        family: Family = tiny_qwen3,
    ) -> None:
        self.shop = Workshop(family(), slots)
        self.told: list[SnapshotTaken | SnapshotFailed] = []
        self.folder, self.silent = folder, False
        self.residents = Residents(self.shop.targets, self.shop.pool, host_bytes, policy, self.tell)
        self.trainer = Trainer(self.shop.engine, self.residents, self.shop.targets, "tiny")
        self.seqs: dict[str, int] = {}

    def tell(self, message: SnapshotTaken | SnapshotFailed) -> None:
        self.told.append(message)
        if isinstance(message, SnapshotTaken) and not self.silent:
            self.residents.recorded(message.run, str(self.folder / message.run / f"{len(self.told)}"))

    def item(self, run: str, kind: CommandKind, folder: str | None = None, restore: str | None = None) -> Item:
        self.seqs[run] = self.seqs.get(run, -1) + 1
        state = AdapterState(run, LoraConfig(rank=4, seed=len(run)), restore, str(self.folder / run / "first"))
        return Item(FutureId(f"{run}:{self.seqs[run]}"), kind, state, folder, seq=self.seqs[run])

    def do(self, *work: tuple[Item, bytes]) -> list[tuple[Outcome, bytes]]:
        ended = self.trainer.run(work)
        self.residents.charge({item.adapter.key for item, _ in work if item.adapter}, 1.0)
        self.residents.make_room()
        return [ended[item.future] for item, _ in work]

    def learn(self, *runs: str) -> list[float]:
        """One backward and a step for each, all together; their losses."""
        passes = [(self.item(run, "forward_backward"), encode(request(len(run)))) for run in runs]
        steps = [(self.item(run, "optim_step"), STEP) for run in runs]
        ends = self.do(*passes, *steps)
        assert all(outcome.error is None for outcome, _ in ends), ends
        return [decode(payload, ForwardBackwardOutput).metrics["loss:sum"] for _, payload in ends[: len(runs)]]

    def snapshot(self) -> None:
        """Write what is due."""
        while snapshot := self.residents.due_snapshot():
            self.residents.written(write_snapshot(snapshot))

    @property
    def adapter_bytes(self) -> int:
        return self.shop.targets.new_adapter(AdapterSpec(rank=4), "cpu").nbytes


@pytest.mark.parametrize("pending", [False, True], ids=["nothing pending", "gradients pending"])
@pytest.mark.parametrize("family", [tiny_qwen3, tiny_qwen3_moe])
def test_a_snapshot_is_the_state_bit_for_bit(family: Family, pending: bool, tmp_path: Path) -> None:
    shop, other = Workshop(family()), Workshop(family())
    adapter = shop.add("run", AdapterSpec(rank=4, seed=1))
    for seed in (1, 2):
        shop.engine.forward_backward([job("run", request(seed))])
        shop.engine.optim_step([("run", AdamParams(learning_rate=1e-2))])
    if pending:
        shop.engine.forward_backward([job("run", request(3))])
    snapshot = Snapshot("run", str(tmp_path / "run" / "one"), 5, adapter.state(copied=True))
    expected = [v.clone() for v in (adapter.weights, adapter.exp_avg, adapter.exp_avg_sq, adapter.grad)]
    shop.engine.forward_backward([job("run", request(4))])
    shop.engine.optim_step([("run", AdamParams(learning_rate=1e-2))])
    assert write_snapshot(snapshot) == SnapshotTaken("run", snapshot.folder, 5, 0.0)
    back = other.add("run", AdapterSpec(rank=4, seed=9))
    restore_state(back, Path(snapshot.folder))
    found = [back.weights, back.exp_avg, back.exp_avg_sq, back.grad]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (back.step, back.pending) == (2, pending)
    assert torch.equal(back.compute, back.weights)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_snapshot_that_was_harmed_is_refused_with_nothing_changed(harm: str, tmp_path: Path) -> None:
    shop = Workshop(tiny_qwen3())
    adapter = shop.add("run", AdapterSpec(rank=4, seed=1))
    write_snapshot(Snapshot("run", str(tmp_path / "one"), 0, adapter.state(copied=True)))
    file = tmp_path / "one" / "snapshot.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(content if harm == "flip" else content[:-1])
    before = adapter.weights.clone()
    with pytest.raises(CheckpointError, match="is missing" if harm == "remove" else "SHA-256"):
        restore_state(adapter, tmp_path / "one")
    assert torch.equal(adapter.weights, before)


def test_a_disk_that_cannot_be_read_is_a_checkpoint_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Workshop(tiny_qwen3())
    adapter = shop.add("run", AdapterSpec(rank=4, seed=1))
    write_snapshot(Snapshot("run", str(tmp_path / "one"), 0, adapter.state(copied=True)))

    def fails(_: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(folders, "_sha256", fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        restore_state(adapter, tmp_path / "one")


def rounds(desk: Desk, runs: Sequence[str], times: int) -> dict[str, list[float]]:
    """Each run by itself, one after the other, again and again."""
    losses: dict[str, list[float]] = {run: [] for run in runs}
    for _ in range(times):
        for run in runs:
            losses[run] += desk.learn(run)
            desk.snapshot()
    return losses


@pytest.mark.parametrize("family", [tiny_qwen3, tiny_qwen3_moe])
def test_runs_that_leave_host_memory_come_back_as_they_were(family: Family, tmp_path: Path) -> None:
    runs = ["a", "bb", "ccc", "dddd", "eeeee"]
    ample = Desk(tmp_path / "ample", family=family)
    expected = rounds(ample, runs, 4)
    tight = Desk(tmp_path / "tight", host_bytes=2 * ample.adapter_bytes, family=family)
    found = {run: [] for run in runs}
    for _ in range(4):
        for run in runs:
            found[run] += tight.learn(run)
            assert tight.shop.pool.host_bytes <= 2 * tight.adapter_bytes
    assert found == {run: exactly(losses) for run, losses in expected.items()}
    assert len(tight.told) >= 12, "each was saved before it left"


def test_a_run_that_was_saved_already_leaves_without_being_written_again(tmp_path: Path) -> None:
    desk = Desk(tmp_path, host_bytes=1, policy=ALWAYS)
    desk.learn("a")
    assert len(desk.told) == 1 and len(desk.shop.pool) == 0
    desk.do((desk.item("a", "forward"), encode(request(1))))
    assert len(desk.told) == 1 and len(desk.shop.pool) == 0


def test_a_users_own_save_is_as_good_as_a_snapshot(tmp_path: Path) -> None:
    desk, other = Desk(tmp_path, host_bytes=1), Desk(tmp_path / "other")
    desk.silent = True
    desk.do((desk.item("a", "forward_backward"), encode(request(1))))  # saved by force, and no other folder is known
    folder = str(tmp_path / "mine")
    desk.do((desk.item("a", "optim_step"), STEP))
    assert len(desk.shop.pool) == 1, "it could not be saved"
    desk.do((desk.item("a", "save_state", folder), b""))
    assert len(desk.shop.pool) == 0
    other.learn("a")
    assert desk.learn("a") == exactly(other.learn("a"))


def test_runs_in_one_batch_are_all_there_however_tight_the_budget(tmp_path: Path) -> None:
    desk, ample = Desk(tmp_path / "tight", host_bytes=1, slots=3), Desk(tmp_path / "ample", slots=3)
    for _ in range(3):
        assert desk.learn("a", "bb", "ccc") == ample.learn("a", "bb", "ccc")
        assert len(desk.shop.pool) == 0


def test_what_the_disk_refuses_stays_in_memory_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, other = Desk(tmp_path, host_bytes=1, policy=ALWAYS), Desk(tmp_path / "other")
    clock = [100.0]
    monkeypatch.setattr("lorry.actors.adapters.residents.time.monotonic", lambda: clock[0])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoints, "write_tensors", full)
        losses = desk.learn("a") + desk.learn("a")
        assert len(desk.shop.pool) == 1
        assert [type(message) for message in desk.told] == [SnapshotFailed], "not at once again"
        assert "No space left" in desk.told[0].reason  # type: ignore[union-attr]
        assert desk.residents.replay_s("a") == 2.0
        assert list((tmp_path / "a").iterdir()) == []
    assert desk.residents.due_snapshot() is None
    wait_s = desk.residents.due_in_s()
    assert wait_s is not None and wait_s > 0
    clock[0] += wait_s
    desk.snapshot()
    desk.residents.make_room()
    assert isinstance(desk.told[-1], SnapshotTaken) and desk.told[-1].seq == 3
    assert len(desk.shop.pool) == 0
    assert losses + desk.learn("a") == other.learn("a") + other.learn("a") + other.learn("a")


@pytest.mark.parametrize(("idle_s", "wait_s"), [(inf, None), (1e30, 24 * 3600), (0, 0)])
def test_any_time_may_be_set_after_which_a_run_is_saved(idle_s: float, wait_s: float | None, tmp_path: Path) -> None:
    desk = Desk(tmp_path, policy=SnapshotPolicy(inf, idle_s))
    assert desk.residents.due_in_s() is None
    desk.learn("a")
    assert desk.residents.due_in_s() == wait_s


def test_what_came_while_a_snapshot_was_written_is_behind_it(tmp_path: Path) -> None:
    desk = Desk(tmp_path, policy=ALWAYS)
    desk.learn("a")
    snapshot = desk.residents.due_snapshot()
    assert snapshot is not None and snapshot.seq == 1
    desk.learn("a")
    assert desk.residents.due_snapshot() is None, "one at a time"
    desk.residents.written(write_snapshot(snapshot))
    assert desk.told == [SnapshotTaken("a", snapshot.folder, 1, 1.0)]
    following = desk.residents.due_snapshot()
    assert following is not None and following.seq == 3 and following.folder != snapshot.folder


def test_a_snapshot_that_a_users_save_overtook_does_not_take_the_run_back(tmp_path: Path) -> None:
    desk, other = Desk(tmp_path, policy=ALWAYS), Desk(tmp_path / "other")
    desk.learn("a")
    snapshot = desk.residents.due_snapshot()
    assert snapshot is not None
    desk.learn("a")
    desk.do((desk.item("a", "save_state", str(tmp_path / "mine")), b""))
    desk.residents.written(write_snapshot(snapshot))
    desk.residents._host_bytes = 1
    desk.residents.make_room()
    assert len(desk.shop.pool) == 0
    other.learn("a")
    other.learn("a")
    assert desk.learn("a") == other.learn("a")


def test_nothing_of_a_run_that_cannot_be_restored_is_executed(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    lost = desk.item("lost", "forward_backward", restore=str(tmp_path / "nowhere"))
    step = desk.item("lost", "optim_step", restore=str(tmp_path / "nowhere"))
    fine = desk.item("a", "forward_backward")
    (first, _), (second, _), (third, _) = desk.do((lost, encode(request(1))), (fine, encode(request(1))), (step, STEP))
    assert first.unrestored and third.unrestored
    assert first.error is not None and first.error.code == "CheckpointError"
    assert second.error is None and not second.unrestored
    assert "lost" not in desk.shop.pool


def test_a_load_that_fails_is_not_a_run_that_cannot_be_restored(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    ((outcome, _),) = desk.do((desk.item("a", "load_state", str(tmp_path / "nowhere")), b""))
    assert outcome.error is not None and outcome.error.code == "CheckpointError"
    assert not outcome.unrestored


def test_a_cold_run_whose_newest_state_is_damaged_comes_back_from_the_one_before_on_the_same_actor(
    tmp_path: Path,
) -> None:
    desk, undisturbed = Desk(tmp_path / "desk", host_bytes=1), Desk(tmp_path / "undisturbed")
    for one in (desk, undisturbed):
        one.learn("a")
        one.learn("a")
    older, newest = (told.folder for told in desk.told)
    [file] = Path(newest).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    [(outcome, _)] = desk.do((desk.item("a", "forward_backward", restore=newest), encode(request(1))))
    assert outcome.unrestored
    desk.seqs["a"] = 1
    work = [(desk.item("a", kind, restore=older), payload) for kind, payload in REPLAY]
    assert [outcome.error for outcome, _ in desk.do(*work)] == [None, None]
    assert desk.learn("a") == undisturbed.learn("a")


REPLAY: list[tuple[CommandKind, bytes]] = [("forward_backward", encode(request(1))), ("optim_step", STEP)]
