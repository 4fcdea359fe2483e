"""What `lorry doctor` finds, and a way back: a copy of a service that runs, restored elsewhere, goes on from there."""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import anyio
import numpy as np
import pytest
from anyio import to_thread
from typer.testing import CliRunner

import lorry
from lorry.backup import back_up, restore
from lorry.cli import app
from lorry.doctor import examine
from lorry.storage.checkpoints import place_of
from lorry.storage.connection import FILE
from lorry.wire.errors import InvalidRequestError
from lorry.wire.model_input import ModelInput
from lorry.wire.types import Datum, TensorData
from tests.conftest import MODEL, Server, Start, start_server
from tests.service.test_recovery import STEP, learn, run_row, wait_until_saved
from tests.service.test_training import datum


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def large() -> Datum:
    """More than a row of the journal holds."""
    tokens = np.arange(3500) % 1000
    inputs = {"target_tokens": TensorData.from_numpy(tokens), "weights": TensorData.from_numpy(np.ones(3500, "f"))}
    return Datum(ModelInput.from_ints(tokens.tolist()), inputs)


async def train(training: lorry.TrainingClient) -> float:
    future = training.forward_backward([datum()], "cross_entropy")
    training.optim_step(STEP)
    return (await future).metrics["loss:sum"]


async def test_a_copy_of_a_running_service_goes_on_elsewhere_from_that_moment(start: Start, tmp_path: Path) -> None:
    server = start("--recovery-s", "0.05", "--idle-save-s", "0", "--sample-rows", "8")
    key = server.new_key("alice")
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    async with lorry.connect(server.address, api_key=key) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        await training.forward([large()], "cross_entropy")
        found = [await train(training) for _ in range(8)]
        saved = (await training.save_state("kept")).path
        async with anyio.create_task_group() as tasks:  # it trains, is saved and sweeps while it is copied
            tasks.start_soon(learn, training, 30)
            assert await to_thread.run_sync(back_up, server.data, copy) == []
    assert examine(server.data) == []
    server.stop()
    await to_thread.run_sync(restore, copy, elsewhere)
    again = start_server(elsewhere)
    try:
        async with lorry.connect(again.address, api_key=key) as service:
            copied = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
            await copied.load_state_with_optimizer(saved)
            losses = [await train(copied) for _ in range(2)]
        async with lorry.connect(again.address, api_key=key) as service:
            fresh = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
            undisturbed = [await train(fresh) for _ in range(10)]
        assert found + losses == undisturbed
        assert str(elsewhere) in run_row(again, training.model_id)["restore_folder"]
    finally:
        again.stop()
    assert examine(elsewhere) == []


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What a service leaves that was stopped: a run of two saved states, and a checkpoint."""
    server = start_server(tmp_path_factory.mktemp("left"), "--recovery-s", "0.02", "--idle-save-s", "0")

    async def use() -> str:
        async with lorry.connect(server.address, api_key=server.new_key("alice")) as service:
            training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
            await learn(training, 2)
            await to_thread.run_sync(wait_until_saved, server, training.model_id, 3)
            await training.save_state("kept")
            await learn(training, 2)
            await to_thread.run_sync(wait_until_saved, server, training.model_id, 8)
            await training.save_weights_for_sampler("sampled")
            return training.model_id

    run = anyio.run(use)
    server.stop()
    return server.data, run


@pytest.fixture
def data(left_behind: tuple[Path, str], tmp_path: Path) -> tuple[Path, str]:
    """A copy, to be damaged."""
    shutil.copytree(left_behind[0], tmp_path / "data")
    return tmp_path / "data", left_behind[1]


def put_a_large_payload(data: Path) -> None:
    with closing(sqlite3.connect(data / FILE)) as database, database:
        database.execute("UPDATE commands SET payload = NULL, payload_file = 'nothing.there' WHERE seq = 8")


Harm = Callable[[Path, str], None]
HARMS: dict[str, tuple[Harm, str]] = {
    "a byte of a checkpoint": (lambda d, r: flip(sampled(d, r) / "adapter_model.safetensors"), "delete the checkpoint"),
    "a checkpoint": (lambda d, r: shutil.rmtree(sampled(d, r)), "delete the checkpoint"),
    "a payload": (lambda d, r: put_a_large_payload(d), "a snapshot of its run"),
}


def sampled(data: Path, run: str) -> Path:
    return data / "checkpoints" / run / "sampler_weights" / "sampled.9"


@pytest.mark.parametrize("harm", HARMS)
def test_the_doctor_finds_what_is_damaged_and_says_what_to_do(
    data: tuple[Path, str], harm: str, tmp_path: Path
) -> None:
    folder, run = data
    command, terminal = ["doctor", "--data", str(folder)], CliRunner(env={"COLUMNS": "300"})
    well = terminal.invoke(app, command)
    assert well.exit_code == 0 and "is what was written" in well.output
    do, advice = HARMS[harm]
    do(folder, run)
    ended = terminal.invoke(app, command)
    assert ended.exit_code == 1 and advice in ended.output
    assert [finding.advice[: len(advice)] for finding in back_up(folder, tmp_path / "copy")] == [advice]
    with pytest.raises(InvalidRequestError, match="which is damaged"):
        restore(tmp_path / "copy", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_the_doctor_knows_what_a_damaged_state_costs_a_run(data: tuple[Path, str]) -> None:
    folder, _ = data
    with closing(sqlite3.connect(folder / FILE)) as database:
        newest, former = database.execute("SELECT restore_folder, former_folder FROM runs").fetchone()
    for state, advice in ((newest, "the run will be rebuilt from the state before"), (former, "while its actor lives")):
        flip(next((folder / "checkpoints").joinpath(*place_of(Path(state))).glob("*.safetensors")))
        found = [finding.advice for finding in examine(folder) if "saved state" in finding.problem]
        assert found and all(each.startswith(advice) for each in found)
    with open(folder / FILE, "r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * 4096)
    assert {finding.where for finding in examine(folder)} == {FILE}


def test_a_backup_or_a_restore_replaces_nothing(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    for do in (lambda: back_up(server.data, tmp_path), lambda: restore(server.data, tmp_path)):
        with pytest.raises(InvalidRequestError, match="expected a folder that does not exist, or is empty"):
            do()
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
