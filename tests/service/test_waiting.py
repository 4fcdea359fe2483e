"""Models that are not there yet, or never will be, and queues that are full: who comes too early waits, told why."""

import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx
import pytest

import lorry
from lorry.actors import actor
from lorry.actors.config import ActorConfig
from lorry.gateway import app
from lorry.gateway.config import GatewayConfig
from lorry.scheduler import broker
from lorry.scheduler.config import BrokerConfig
from lorry.storage.store import Store
from lorry.wire.ids import ActorId, TenantId
from lorry.wire.tasks import background_tasks
from tests.conftest import BASE_MODEL, MODEL
from tests.service.test_training import datum

TOKEN = "a-token"
STEP = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0, "grad_clip_norm": 0}


@dataclass(frozen=True, slots=True)
class Early:
    """A broker and a gateway in this process, and no actor yet."""

    clients: str
    actors: str
    key: str
    http: httpx.AsyncClient

    @asynccontextmanager
    async def actor(self) -> AsyncGenerator[None]:
        """In this process, which has imported torch already: a process of its own would do so for seconds."""
        config = ActorConfig(ActorId("actor"), MODEL, str(BASE_MODEL), self.actors, TOKEN)
        async with background_tasks() as tasks:
            tasks.start_soon(actor.serve, config, lambda: None, anyio.Event())
            yield

    @contextmanager
    def actor_process(self, model: str = f"{MODEL}={BASE_MODEL}") -> Generator["subprocess.Popen[str]"]:
        command = [sys.executable, "-m", "lorry", "--log-level", "error", "actor", "--model", model]
        process = subprocess.Popen(
            [*command, "--connect", self.actors],
            env=os.environ | {"LORRY_ACTOR_TOKEN": TOKEN},
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            yield process
            process.kill()  # asked to stop, it would wait for the broker, whose event loop waits for it here

    async def post(self, endpoint: str, **body: object) -> dict[str, object]:
        return (await self.http.post(endpoint, json=body)).json()

    async def new_run(self, rank: int = 4) -> str:
        session = await self.post("create_session", tags=[], user_metadata=None, sdk_version="0")
        made = await self.post(
            "create_model",
            session_id=session["session_id"],
            model_seq_id=0,
            base_model=MODEL,
            lora_config={"rank": rank},
        )
        return str(made["request_id"])


@asynccontextmanager
async def early(data: Path, heartbeat_s: float = 60, **settings: int) -> AsyncGenerator[Early]:
    config = BrokerConfig(data, (MODEL, "broken"), TOKEN, "tcp://127.0.0.1:*", heartbeat_s=heartbeat_s, **settings)
    async with broker.running(config) as addresses:
        store = Store(data)
        key = store.create_key(TenantId("early"), 0.0)
        store.close()
        async with (
            app.running(GatewayConfig(addresses.clients, port=0, long_poll_s=0.2)) as url,
            httpx.AsyncClient(base_url=f"{url}/api/v1", headers={"X-API-Key": key}, timeout=None) as http,
        ):
            yield Early(addresses.clients, addresses.actors, key, http)


async def test_a_script_that_starts_before_the_model_is_loaded_waits_and_is_told_why(tmp_path: Path) -> None:
    async with early(tmp_path) as there:
        request = await there.new_run()
        answer = await there.post("retrieve_future", request_id=request)
        assert answer["queue_state"] == "paused_capacity"
        assert answer["queue_state_reason"] == f"{MODEL} is being loaded"
        assert (await there.http.get("healthz")).json() == {"status": "ok"}
        readiness = await there.http.get("readyz")
        assert (readiness.status_code, readiness.json()["models"]["loading"]) == (503, 2)
        assert (await there.http.post("get_info", json={"model_id": request.partition("@")[2]})).status_code == 503
        async with lorry.connect(there.clients, api_key=there.key) as service:
            names = [model.model_name for model in (await service.get_server_capabilities_async()).supported_models]
            assert names == [MODEL, "broken"]
            sampler = await service.create_sampling_client_async(base_model=MODEL)
            sample = sampler.sample(lorry.ModelInput.from_ints([1, 2]), 1, lorry.SamplingParams(max_tokens=2, stop=[]))

            async def train() -> None:
                training = await service.create_lora_training_client_async(MODEL, rank=4)
                assert (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] > 0

            async with there.actor(), anyio.create_task_group() as tasks:
                tasks.start_soon(train)
                assert len((await sample).sequences[0].tokens) == 2
                while (await there.post("retrieve_future", request_id=request)).get("type") == "try_again":
                    pass


async def test_what_no_actor_could_make_is_refused_as_soon_as_that_is_known(tmp_path: Path) -> None:
    async with early(tmp_path) as there:
        request = await there.new_run(rank=1000)
        async with lorry.connect(there.clients, api_key=there.key) as service:
            with pytest.raises(lorry.InvalidRequestError, match="rank"):
                await service.create_lora_training_client_async(MODEL, rank=2**63)
            async with there.actor():
                with pytest.raises(lorry.InvalidRequestError, match="from 1 to 256"):
                    await service.create_lora_training_client_async(MODEL, rank=1000)
        while (answer := await there.post("retrieve_future", request_id=request)).get("type") == "try_again":
            pass
        assert "from 1 to 256" in str(answer["error"]) and answer["category"] == "user"
        step = {"model_id": request.partition("@")[2], "seq_id": 1, "optim_params": STEP}
        refused = await there.post("retrieve_future", request_id=(await there.post("optim_step", **step))["request_id"])
        assert "from 1 to 256" in str(refused["error"])


async def test_a_model_that_cannot_be_loaded_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    async with early(tmp_path / "data") as there:
        async with lorry.connect(there.clients, api_key=there.key) as service:
            with there.actor_process(f"broken={tmp_path / 'empty'}") as process:
                with pytest.raises(lorry.UnsupportedModelError, match="cannot load a base model"):
                    await service.create_lora_training_client_async("broken", rank=4)
                await anyio.to_thread.run_sync(process.wait)
            names = [model.model_name for model in (await service.get_server_capabilities_async()).supported_models]
            assert names == [MODEL]
        health = (await there.http.get("readyz")).json()
        assert health["models"] == {"ready": 0, "loading": 1, "failed": 1}


@pytest.mark.long
async def test_while_the_only_actor_is_replaced_work_waits(tmp_path: Path) -> None:
    async with early(tmp_path, heartbeat_s=0.2) as there, lorry.connect(there.clients, api_key=there.key) as service:
        with there.actor_process() as process:
            training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
            before = (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"]
            process.kill()
        another = await service.create_lora_training_client_async(MODEL, rank=4)
        waiting = [run.forward([datum()], "cross_entropy") for run in (training, another)]
        request = await there.new_run()
        paused = {"queue_state": "paused_capacity", "queue_state_reason": f"no actor serves {MODEL} at the moment"}
        answer: dict[str, object] = {}
        while answer | paused != answer:  # until the broker has noticed
            answer = await there.post("retrieve_future", request_id=f"pass@{waiting[0].id}")
        assert (await there.http.get("readyz")).status_code == 503
        with there.actor_process():
            assert [(await w).metrics["loss:sum"] for w in waiting] == pytest.approx([before, before], rel=1e-5)
            assert "model_id" in await there.post("retrieve_future", request_id=request)


async def test_more_commands_than_may_wait_wait_where_they_come_from(tmp_path: Path) -> None:
    async with early(tmp_path, max_waiting=2) as there, lorry.connect(there.clients, api_key=there.key) as service:
        run = str(await there.new_run()).partition("@")[2]
        steps = [
            await there.http.post("optim_step", json={"model_id": run, "seq_id": seq, "optim_params": STEP})
            for seq in range(1, 5)
        ]
        assert [answer.status_code for answer in steps] == [200, 200, 200, 429]
        assert "after a while" in steps[-1].json()["detail"] and steps[-1].headers["retry-after"] == "1"
        async with there.actor():
            training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
            futures = [training.forward_backward([datum()], "cross_entropy") for _ in range(20)]
            losses = [(await future).metrics["loss:sum"] for future in futures]
        assert losses == pytest.approx([losses[0]] * 20, rel=1e-5)
