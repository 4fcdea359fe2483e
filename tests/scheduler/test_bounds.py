"""What the journal and its folders hold is bounded, however long a run is: a real broker, and an actor that computes
nothing."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import anyio
import numpy as np
import pytest

import lorry
from lorry.scheduler import broker, saves
from lorry.scheduler.config import BrokerConfig
from lorry.storage.blobs import FOLDER
from lorry.storage.store import Store
from lorry.wire import sockets
from lorry.wire.client_messages import VERSION, CreateSampler, Hello, Resolved, SamplerCreated, Submit, ToClient
from lorry.wire.codec import decode, encode
from lorry.wire.errors import NotFoundError
from lorry.wire.ids import LaneId, TenantId, future_id
from lorry.wire.model_input import ModelInput
from lorry.wire.sequenced import UNCONFIRMED_AT_MOST, Link, stamp_of
from lorry.wire.types import Datum, SamplingParams, TensorData

from .scripted import SAMPLE, scripted_actor

PROMPT = ModelInput.from_ints([1])
PARAMS = SamplingParams(max_tokens=1, stop=[])


@dataclass(frozen=True, slots=True)
class Service:
    client: lorry.ServiceClient
    data: Path
    address: str
    key: str


@asynccontextmanager
async def serving(tmp_path: Path, sample: bytes = SAMPLE) -> AsyncGenerator[Service]:
    """Payloads are read from the journal when their turn comes, and a run is saved after each ten commands."""
    config = BrokerConfig(tmp_path, ("m",), "token", bind="tcp://127.0.0.1:*", heartbeat_s=60, waiting_bytes=1000)
    async with broker.running(config) as addresses:
        store = Store(tmp_path)
        key = store.create_key(TenantId("alice"), 1.0)
        store.close()
        async with (
            scripted_actor(addresses.actors, "token", "m", save_every=10, sample=sample),
            lorry.connect(addresses.clients, api_key=key) as client,
        ):
            yield Service(client, tmp_path, addresses.clients, key)


def large() -> Datum:
    """About 100 KB on the wire."""
    tokens = np.arange(8000) % 1000
    targets = TensorData.from_numpy(tokens)
    weights = TensorData.from_numpy(np.ones(8000, dtype=np.float32))
    return Datum(ModelInput.from_ints(tokens.tolist()), {"target_tokens": targets, "weights": weights})


def files(service: Service) -> int:
    return len(list((service.data / FOLDER).glob("*")))


async def test_payloads_go_when_two_saved_states_cover_them(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        training = await service.client.create_lora_training_client_async("m", rank=4)
        for _ in range(20):
            futures = [training.forward_backward([large()], "cross_entropy") for _ in range(5)]
            for future in futures:
                await future
        # The newest point may be at any of the last ten, the one before ten earlier.
        assert 0 < files(service) <= 30


async def test_a_loop_that_samples_at_every_step_keeps_a_few_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorry.scheduler.finishing.ASKED_WITHIN_S", 0.0)
    async with serving(tmp_path) as service:
        training = await service.client.create_lora_training_client_async("m", rank=4)
        reference = await training.save_weights_and_get_sampling_client_async()
        for step in range(30):
            sampler = await training.save_weights_and_get_sampling_client_async()
            await sampler.sample_async(PROMPT, 1, PARAMS)
            if step < 20:  # who is asked now and then stays
                await reference.sample_async(PROMPT, 1, PARAMS)
        gone = f"are gone: they have no name, their run saved {saves.NEWEST_KEPT} newer"
        with pytest.raises(NotFoundError, match=gone):
            await reference.sample_async(PROMPT, 1, PARAMS)
        named = await training.save_weights_and_get_sampling_client_async("kept")
        for _ in range(6):
            await training.save_weights_and_get_sampling_client_async()
        await named.sample_async(PROMPT, 1, PARAMS)
        folder = service.data / "checkpoints" / training.model_id / "sampler_weights"
        while len(list(folder.iterdir())) > 6:  # noqa: ASYNC110  folders ring no bell
            await anyio.sleep(0.01)


LARGE_RESULT = bytes(8 << 20)


async def test_a_client_that_does_not_read_fills_nobodys_memory_and_gets_all_of_it_later(tmp_path: Path) -> None:
    async with serving(tmp_path, LARGE_RESULT) as service:
        with sockets.connect(service.address, None, b"slow") as channel:
            link = Link(channel.send)
            channel.send([encode(Hello(VERSION, service.key, "slow"))])
            ((welcome,),) = await channel.receive()
            link.open(decode(welcome, ToClient).session)
            link.send([encode(CreateSampler(1, "nonce", base_model="m"))])
            ((stamp, _, answer),) = await channel.receive()
            assert stamp_of([stamp]) is not None
            lane = LaneId(decode(answer, SamplerCreated).sampler)
            for seq in range(12):
                link.send([encode(Submit(2 + seq, lane, seq, "sample")), b""])
            unread: list[list[bytes]] = []
            with closing(Store(tmp_path)) as store:
                while not all(store.result(future_id(lane, seq)) for seq in range(12)):
                    with anyio.move_on_after(0.1):
                        unread += await channel.receive()
            with anyio.move_on_after(0.5):
                unread += await channel.receive()
            assert sum(len(frames[-1]) for frames in unread) <= UNCONFIRMED_AT_MOST + len(LARGE_RESULT)
            seen: list[int] = []
            while len(seen) < 12:
                for frames in unread:
                    stamp = stamp_of(frames)
                    assert stamp is not None
                    for header, *payload in link.receive(stamp, frames[1:]):
                        if isinstance(message := decode(header, ToClient), Resolved):
                            assert payload == [LARGE_RESULT]
                            seen.append(int(message.future.rpartition(":")[2]))
                unread = await channel.receive() if len(seen) < 12 else []
            assert seen == sorted(seen)
