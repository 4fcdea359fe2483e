"""Who asks over HTTP has read a result when it was sent to somebody who was still there."""

from pathlib import Path

import anyio
import httpx

from lorry.gateway import app
from lorry.gateway.config import GatewayConfig
from lorry.wire.ids import FutureId
from tests.scheduler.test_client_door import Serving

STEP = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0, "grad_clip_norm": 0}


async def step(http: httpx.AsyncClient, run: str, seq: int) -> str:
    answer = await http.post("optim_step", json={"model_id": run, "seq_id": seq, "optim_params": STEP})
    return answer.json()["request_id"]


async def test_a_result_whose_reader_has_hung_up_is_not_read(tmp_path: Path) -> None:
    async with (
        Serving(tmp_path, heartbeat_s=0.5) as service,
        app.running(GatewayConfig(service.address, port=0, long_poll_s=60)) as url,
        httpx.AsyncClient(base_url=f"{url}/api/v1", headers={"X-API-Key": service.key}, timeout=None) as http,
    ):
        session = (
            await http.post("create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0"})
        ).json()["session_id"]
        model = {"session_id": session, "model_seq_id": 0, "base_model": "m", "lora_config": {"rank": 4}}
        run = (await http.post("create_model", json=model)).json()["request_id"].partition("@")[2]
        first, second = [await step(http, run, seq) for seq in (1, 2)]
        with anyio.move_on_after(0.2):
            await http.post("retrieve_future", json={"request_id": first})
        await http.get("healthz")  # by its answer the gateway has noticed
        service.may_work.set()
        await http.post("retrieve_future", json={"request_id": second})
        while not service.is_read(FutureId(f"{run}:2")):  # noqa: ASYNC110  the journal rings no bell
            await anyio.sleep(0.01)
        assert not service.is_read(FutureId(f"{run}:1"))
        await http.post("retrieve_future", json={"request_id": first})
        while not service.is_read(FutureId(f"{run}:1")):  # noqa: ASYNC110
            await anyio.sleep(0.01)
