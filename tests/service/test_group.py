"""One model on several devices, or on one and beside it on several, as a user has it: through the service."""

import os
import random
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import anyio
import psutil
import pytest

import lorry
from lorry.storage.connection import FILE
from tests.conftest import BASE_MODEL, LORRY, MODEL, Server, Start, children_of
from tests.service.test_recovery import STEP, learn
from tests.service.test_training import datum

AMONG_TWO = ("--tensor-parallel", "2")


def ranks_of(server: Server) -> list[psutil.Process]:
    """All but the first, of the one actor that there is; none while it starts anew."""
    actor = children_of(server.process.pid).get("actor")
    if actor is None:
        return []
    try:
        return [child for child in psutil.Process(actor).children() if "lorry.actors.group.follower" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
async def test_a_rank_that_is_killed_costs_time_alone(start: Start, kills: int) -> None:
    """At any moment: the runs go on, and so does sampling."""
    server, moments, steps = start(*AMONG_TWO), random.Random(kills), 6 * (kills + 1)
    async with lorry.connect(server.address, api_key=server.new_key("hurt")) as service:
        undisturbed = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        expected = await learn(undisturbed, steps)
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        found: list[float] = []
        while len(found) < steps:  # few at a time: what is under way when three actors die is not tried again
            futures = []
            for _ in range(6):
                futures.append(training.forward_backward([datum()], "cross_entropy"))
                training.optim_step(STEP)
            for future in futures[: moments.randrange(4)]:
                await future
            await anyio.sleep(moments.uniform(0, 0.05))
            if len(found) < 6 * kills:
                for rank in ranks_of(server):
                    rank.send_signal(signal.SIGKILL)
            found += [(await future).metrics["loss:sum"] for future in futures]
        assert found == pytest.approx(expected, rel=1e-5)
        sampler = await training.save_weights_and_get_sampling_client_async()
        prompt = lorry.ModelInput.from_ints([5, 6, 7])
        response = await sampler.sample_async(prompt, 2, lorry.SamplingParams(max_tokens=4, seed=1))
        assert [len(sequence.tokens) for sequence in response.sequences] == [4, 4]
        usage = await service.create_rest_client().get_usage_async()
        tokens = 2 * steps * datum().model_input.length
        assert sum(row.tokens for row in usage if row.kind == "train") == tokens


def home_of(server: Server, run: str) -> str:
    with closing(sqlite3.connect(server.data / FILE)) as database:
        query = "SELECT DISTINCT actor FROM commands WHERE lane = ? AND actor IS NOT NULL"
        ((actor,),) = database.execute(query, [run]).fetchall()
    return actor


async def test_a_run_that_one_device_saved_goes_on_among_several_and_the_other_way(start: Start) -> None:
    """Both serve one model: new runs come to whoever has fewer."""
    server = start("--replicas", "2", "--for", f"{MODEL}#1:tensor-parallel=2")
    async with lorry.connect(server.address, api_key=server.new_key("both")) as service:
        runs = [await service.create_lora_training_client_async(MODEL, rank=4, seed=i) for i in (1, 2)]
        for run in runs:
            await learn(run, 3)
            path = (await run.save_state("three")).path
            copies = [await service.create_lora_training_client_async(MODEL, rank=4, seed=3) for _ in runs]
            for copy in copies:
                await copy.load_state_with_optimizer(path)
            expected = pytest.approx(await learn(run, 3), rel=1e-5)
            assert [await learn(copy, 3) for copy in copies] == [expected, expected]
            homes = {home_of(server, copy.model_id) for copy in copies}
            assert homes == {f"{MODEL}#0", f"{MODEL}#1"}
        assert {home_of(server, run.model_id) for run in runs} == homes


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--tensor-parallel", "3"), "--tensor-parallel must be a divisor of 4"),
        ((*AMONG_TWO, "--compile"), "compile is True"),
        ((*AMONG_TWO, "--for", f"{MODEL}#1:slots=2"), "for is "),
    ],
)
def test_what_a_group_cannot_do_is_refused_when_it_starts(
    tmp_path: Path, options: tuple[str, ...], problem: str
) -> None:
    command = [*LORRY, "serve", "--model", f"{MODEL}={BASE_MODEL}", "--no-http", "--bind", "tcp://127.0.0.1:*"]
    command += ["--data", str(tmp_path), *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})
    assert ended.returncode != 0
    assert problem in ended.stderr
