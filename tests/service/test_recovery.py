"""A run is rebuilt from its newest saved state: fast, exactly, whatever became of its files."""

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import lorry
from lorry.storage.connection import FILE
from tests.conftest import MODEL, Server, Start, children_of, start_server
from tests.service.test_training import datum

STEP = lorry.AdamParams(learning_rate=1e-3)


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that saves runs' states all the time, and that tests may harm: each has a tenant of its own."""
    server = start_server(tmp_path_factory.mktemp("eager"), "--recovery-s", "0.02", "--idle-save-s", "0")
    yield server
    server.stop()


def run_row(server: Server, run: str) -> dict[str, Any]:
    with closing(sqlite3.connect(server.data / FILE)) as database:
        database.row_factory = sqlite3.Row
        return dict(database.execute("SELECT * FROM runs WHERE id = ?", [run]).fetchone())


def wait_until_saved(server: Server, run: str, seq: int) -> dict[str, Any]:
    """Its newest restore point covers `seq`."""
    while (row := run_row(server, run))["restore_seq"] < seq:
        time.sleep(0.05)
    return row


def kill(server: Server, role: str = "actor") -> None:
    os.kill(children_of(server.process.pid)[role], signal.SIGKILL)


async def learn(training: lorry.TrainingClient, steps: int) -> list[float]:
    futures = []
    for _ in range(steps):
        futures.append(training.forward_backward([datum()], "cross_entropy"))
        training.optim_step(STEP)
    return [(await future).metrics["loss:sum"] for future in futures]


@pytest.mark.parametrize("victim", ["actor", pytest.param("broker", marks=pytest.mark.long)])
async def test_a_run_goes_on_from_a_snapshot_bit_for_bit(eager: Server, victim: str) -> None:
    async with lorry.connect(eager.address, api_key=eager.new_key(f"hurt by its {victim}")) as service:
        undisturbed = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        expected = await learn(undisturbed, 15)
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        found: list[float] = []
        for is_killed in (True, True, False):
            found += await learn(training, 5)
            row = wait_until_saved(eager, training.model_id, 2 * len(found) - 1)
            assert row["replay_s"] == 0
            if is_killed:
                kill(eager, victim)
        assert found == expected
        with closing(sqlite3.connect(eager.data / FILE)) as database:
            kept = "SELECT count(*) FROM commands WHERE lane = ? AND payload IS NOT NULL AND seq <= ?"
            assert database.execute(kept, [row["id"], row["former_seq"]]).fetchone() == (0,)
        usage = await service.create_rest_client().get_usage_async()
        assert [row.tokens for row in usage if row.kind == "train"] == [180, 180]


@pytest.mark.parametrize("victim", ["actor", pytest.param("broker", marks=pytest.mark.long)])
async def test_a_runs_numbers_are_what_its_futures_gave_whatever_died(eager: Server, victim: str) -> None:
    async with lorry.connect(eager.address, api_key=eager.new_key(f"numbers, its {victim} dies")) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        gave: list[dict[str, float]] = []
        for is_killed in (True, False):
            for _ in range(3):
                passed, again = (training.forward_backward([datum(i)], "cross_entropy") for i in (0, 3))
                stepped = training.optim_step(STEP)
                losses = [(await future).metrics["loss:sum"] for future in (passed, again)]
                tokens = float(2 * datum().model_input.length)
                gave.append({"loss:sum": sum(losses), "tokens:sum": tokens} | (await stepped).metrics)
                await training.log_metrics({"loss/mean": sum(losses) / 2}, len(gave) - 1)
            if is_killed:
                kill(eager, victim)
        found = await service.create_rest_client().get_run_metrics_async(training.model_id)
    assert [point.values for point in found if point.source == "training"] == gave
    assert [point.values["loss/mean"] for point in found if point.source == "loop"] == [
        values["loss:sum"] / 2 for values in gave
    ]


async def test_a_snapshot_holds_the_gradient_that_is_pending(eager: Server) -> None:
    async with lorry.connect(eager.address, api_key=eager.new_key("pending")) as service:
        losses = []
        for is_killed in (False, True):
            training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
            await training.forward_backward([datum()], "cross_entropy")
            await training.forward_backward([datum(3)], "cross_entropy")
            if is_killed:
                wait_until_saved(eager, training.model_id, 1)
                kill(eager)
            norm = (await training.optim_step(STEP)).metrics["grad_norm"]
            losses.append((norm, await learn(training, 2)))
        assert losses[0] == losses[1]


async def test_a_snapshot_that_cannot_be_read_costs_time_alone(eager: Server) -> None:
    async with lorry.connect(eager.address, api_key=eager.new_key("unread")) as service:
        expected = await learn(await service.create_lora_training_client_async(MODEL, rank=4, seed=1), 12)
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        found = await learn(training, 4)
        wait_until_saved(eager, training.model_id, 7)
        found += await learn(training, 4)
        row = wait_until_saved(eager, training.model_id, 15)
        vectors = Path(row["restore_folder"]) / "snapshot.safetensors"
        content = bytearray(vectors.read_bytes())
        content[-100] ^= 1
        vectors.write_bytes(content)
        kill(eager)
        other = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        assert found + await learn(training, 4) == expected
        assert await learn(other, 2) == expected[:2]


async def test_a_run_that_nothing_gives_back_says_so_and_disturbs_nobody(eager: Server) -> None:
    async with lorry.connect(eager.address, api_key=eager.new_key("lost")) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        other = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        for done in (2, 4):
            await learn(training, 2)
            row = wait_until_saved(eager, training.model_id, 2 * done - 1)
        await learn(other, 2)
        for folder in (row["restore_folder"], row["former_folder"]):
            (Path(folder) / "snapshot.safetensors").write_bytes(b"")
        kill(eager)
        with pytest.raises(lorry.ActorLostError, match="could not be rebuilt"):
            await training.forward([datum()], "cross_entropy")
        assert len(await learn(other, 2)) == 2


@pytest.mark.long
async def test_runs_that_do_not_fit_into_memory_train_as_if_they_did(start: Start) -> None:
    server = start("--host-memory", "1", "--slots", "2")
    async with lorry.connect(server.address, api_key=server.new_key("alice")) as service:
        expected = await learn(await service.create_lora_training_client_async(MODEL, rank=4, seed=1), 6)
        runs = [await service.create_lora_training_client_async(MODEL, rank=4, seed=1) for _ in range(5)]
        found: dict[str, list[float]] = {run.model_id: [] for run in runs}
        for _ in range(6):
            for run in runs:
                found[run.model_id] += await learn(run, 1)
        assert list(found.values()) == [expected] * 5
        kill(server)
        assert await learn(runs[0], 1) == await learn(runs[1], 1)
