"""What stops in good order: nothing of it is repeated; and what does not: nothing of it is lost."""

import os
import signal
import sqlite3
import subprocess
from contextlib import closing

import pytest
from anyio import to_thread

import lorry
from lorry.storage.connection import FILE
from tests.conftest import LORRY, MODEL, Server, Start, children_of
from tests.service.test_recovery import learn
from tests.service.test_training import datum


def behind(server: Server) -> list[tuple[int, int, float]]:
    """Of each run: to which request it is saved, its last request, and what a replay would cost."""
    with closing(sqlite3.connect(server.data / FILE)) as database:
        last = "(SELECT max(seq) FROM commands WHERE lane = runs.id)"
        return database.execute(f"SELECT restore_seq, {last}, replay_s FROM runs ORDER BY created_at").fetchall()


async def test_a_service_that_is_told_to_stop_saves_every_run_first(start: Start) -> None:
    server = start()
    async with lorry.connect(server.address, api_key=server.new_key("alice"), timeout_s=60) as service:
        undisturbed, training, other = [
            await service.create_lora_training_client_async(MODEL, rank=4, seed=1) for _ in range(3)
        ]
        expected = await learn(undisturbed, 8)
        found = await learn(training, 4)
        await other.forward_backward([datum()], "cross_entropy")
        server.process.send_signal(signal.SIGTERM)
        with server.process:
            assert server.process.wait() == 0
        assert behind(server) == [(15, 15, 0.0), (7, 7, 0.0), (0, 0, 0.0)]
        server = start("--bind", server.address)
        assert found + await learn(training, 4) == expected
        assert (await other.optim_step(lorry.AdamParams())).metrics["grad_norm"] > 0


@pytest.mark.long
async def test_an_actor_that_is_told_to_stop_ends_what_it_holds(start: Start) -> None:
    server = start()
    async with lorry.connect(server.address, api_key=server.new_key("alice")) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        await learn(training, 2)
        base = await service.create_sampling_client_async(base_model=MODEL)
        params = lorry.SamplingParams(max_tokens=300, stop=[], seed=1)
        sample = base.sample(lorry.ModelInput.from_ints([1, 2, 3]), 1, params)
        await base.sample(lorry.ModelInput.from_ints([1]), 1, lorry.SamplingParams(max_tokens=1, stop=[]))
        os.kill(children_of(server.process.pid)["actor"], signal.SIGTERM)
        assert len((await sample).sequences[0].tokens) == 300
        assert len(await learn(training, 1)) == 1
    with closing(sqlite3.connect(server.data / FILE)) as database:
        kinds = [kind for (kind,) in database.execute("SELECT kind FROM events")]
    assert kinds == ["actor stopped"]


@pytest.mark.long
async def test_a_second_signal_ends_at_once_and_loses_nothing(start: Start) -> None:
    server = start("--grace-s", "10000")
    async with lorry.connect(server.address, api_key=server.new_key("alice"), timeout_s=60) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        found = await learn(training, 2)
        base = await service.create_sampling_client_async(base_model=MODEL)
        params = lorry.SamplingParams(max_tokens=3000, stop=[], seed=1)
        samples = base.sample(lorry.ModelInput.from_ints([1, 2, 3]), 16, params)
        await base.sample(lorry.ModelInput.from_ints([1]), 1, lorry.SamplingParams(max_tokens=1, stop=[]))
        backward = await training.forward_backward_async([datum()], "cross_entropy")
        server.process.send_signal(signal.SIGTERM)
        with server.process:
            while server.process.poll() is None:
                server.process.send_signal(signal.SIGTERM)
        server = start("--bind", server.address)
        assert (await backward).metrics["loss:sum"] > 0
        assert len(found + await learn(training, 1)) == 3
        await samples.cancel()


async def test_an_actor_that_is_drained_leaves_its_runs_to_another(start: Start) -> None:
    server = start("--replicas", "2")

    def drain(actor: str) -> subprocess.CompletedProcess[str]:
        words = ["drain", actor, "--data", str(server.data), "--connect", server.address]
        return subprocess.run([*LORRY, *words], capture_output=True, text=True, check=False)

    async with lorry.connect(server.address, api_key=server.new_key("alice")) as service:
        runs = [await service.create_lora_training_client_async(MODEL, rank=4, seed=1) for _ in range(2)]
        expected = await learn(runs[0], 6)
        found = await learn(runs[1], 3)
        for number in range(2):
            ended = await to_thread.run_sync(drain, f"{MODEL}#{number}")
            assert (ended.returncode, ended.stdout) == (0, f"{MODEL}#{number} has left.\n")
            found += await learn(runs[1], 1)
        assert found + await learn(runs[1], 1) == expected
        unknown = await to_thread.run_sync(drain, "nobody")
        assert unknown.returncode != 0 and "there is no actor 'nobody'; there are: " in unknown.stderr
        (server.data / "operator.key").write_text("guessed")
        assert "operator.key" in (await to_thread.run_sync(drain, f"{MODEL}#0")).stderr
    with closing(sqlite3.connect(server.data / FILE)) as database:
        kinds = [kind for (kind,) in database.execute("SELECT kind FROM events")]
    assert kinds == ["actor stopped"] * 2
