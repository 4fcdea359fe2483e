"""Processes that are neither dead nor alive: stopped, or with a compute thread that never comes back."""

import os
import signal
from pathlib import Path

import anyio
import httpx
import pytest

import lorry
from tests.conftest import MODEL, Start, children_of
from tests.service.test_training import datum

POISON = 1999
POISONED_ENGINE = f"""
import os
import sys

if "actor" in sys.orig_argv:
    from lorry.actors.training.engine import Engine

    computes = Engine.forward_backward

    def dies(engine, jobs):
        while any({POISON} in datum.model_input.to_ints() for job in jobs for datum in job.request.data):
            DEED
        return computes(engine, jobs)

    Engine.forward_backward = dies
"""


@pytest.mark.long
@pytest.mark.parametrize("deed", ["pass", "os._exit(1)"], ids=["hangs", "kills at once"])
async def test_a_command_that_ends_three_actors_fails_alone(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(POISONED_ENGINE.replace("DEED", deed))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = start("--hang-s", "2", "--heartbeat-s", "1")
    async with lorry.connect(server.address, api_key=server.new_key("alice"), timeout_s=60) as service:
        training, other = [await service.create_lora_training_client_async(MODEL, rank=4, seed=1) for _ in range(2)]
        first = await training.forward_backward([datum()], "cross_entropy")
        poison = lorry.Datum(lorry.ModelInput.from_ints([POISON] * 3), {"target_tokens": lorry.TensorData([1] * 3)})
        hung = training.forward([poison], "cross_entropy")
        innocent = other.forward_backward([datum()], "cross_entropy")
        with pytest.raises(lorry.ActorKilledError, match="3 actors died"):
            await hung
        assert (await innocent).metrics == first.metrics
        again = await training.forward([datum()], "cross_entropy")
        assert again.metrics == first.metrics


async def test_processes_that_are_stopped_are_replaced(start: Start) -> None:
    server = start("--heartbeat-s", "1", "--http", "127.0.0.1:0")
    async with lorry.connect(server.address, api_key=server.new_key("alice"), timeout_s=60) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        first = await training.forward_backward([datum()], "cross_entropy")
        for process in children_of(server.process.pid).values():
            os.kill(process, signal.SIGSTOP)
        assert (await training.forward([datum()], "cross_entropy")).metrics == first.metrics
    async with httpx.AsyncClient(base_url=server.url) as http:
        while True:
            try:
                assert (await http.get("/api/v1/healthz")).status_code == 200
                break
            except httpx.TransportError:  # not yet
                await anyio.sleep(0.1)
