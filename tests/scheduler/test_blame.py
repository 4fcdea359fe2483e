"""Which deaths of actors a command is blamed for: those of actors that had it."""

import os
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

import lorry
from lorry.scheduler import broker
from lorry.scheduler.config import BrokerConfig
from lorry.scheduler.planning.ledger import MAX_ATTEMPTS
from lorry.storage.store import Store
from lorry.wire import sockets
from lorry.wire.actor_messages import (
    VERSION,
    ActorHello,
    ActorPing,
    ActorPong,
    ActorWelcome,
    Capacity,
    MicroBatch,
    ToActor,
)
from lorry.wire.codec import decode, encode
from lorry.wire.errors import ActorKilledError
from lorry.wire.ids import ActorId, TenantId
from lorry.wire.model_input import ModelInput
from lorry.wire.sequenced import Link, stamp_of
from lorry.wire.types import SamplingParams

from .scripted import FACTS, scripted_actor

PROMPT = ModelInput.from_ints([1])
PARAMS = SamplingParams(max_tokens=1, stop=[])


@asynccontextmanager
async def sampling(data: Path) -> AsyncGenerator[tuple[str, lorry.SamplingClient]]:
    """The broker's address for actors, of which there is none yet but for the one that told of the model."""
    config = BrokerConfig(data, ("m",), "token", bind="tcp://127.0.0.1:*", heartbeat_s=60)
    async with broker.running(config) as addresses:
        store = Store(data)
        key = store.create_key(TenantId("alice"), 1.0)
        store.close()
        async with lorry.connect(addresses.clients, api_key=key) as client:
            async with scripted_actor(addresses.actors, "token", "m"):
                sampler = await client.create_sampling_client_async(base_model="m")
            yield addresses.actors, sampler


async def die_with_a_batch(address: str, *, reads: bool) -> None:
    """The next life of the same actor: handed something, it is gone, and has read that or has not."""
    with sockets.connect(address, None, b"actor-" + secrets.token_bytes(8)) as channel:
        hello = ActorHello(VERSION, "token", ActorId("scripted"), "m", Capacity(8, 1000, 64, 64), FACTS, os.getpid())
        channel.send([encode(hello)])
        link = Link(channel.send)
        while True:
            for frames in await channel.receive():
                bare = frames if stamp_of(frames) is None else frames[1:]
                match decode(bare[0], ToActor):
                    case ActorWelcome(session):
                        link.open(session)
                    case MicroBatch():
                        if not reads:
                            return
                        link.arrived(frames)
                        link.confirm()
                        link.beat([encode(ActorPing())])
                    case ActorPong():  # so the broker has heard that, whatever its next life says first
                        return
                    case _:
                        pass


async def test_a_command_is_blamed_for_actors_that_had_read_it(tmp_path: Path) -> None:
    async with sampling(tmp_path) as (address, sampler):
        future = sampler.sample(PROMPT, 1, PARAMS)
        for _ in range(MAX_ATTEMPTS):
            await die_with_a_batch(address, reads=True)
        async with scripted_actor(address, "token", "m"):
            with pytest.raises(ActorKilledError, match=f"{MAX_ATTEMPTS} actors died"):
                await future


async def test_a_command_is_not_blamed_for_actors_that_it_never_reached(tmp_path: Path) -> None:
    async with sampling(tmp_path) as (address, sampler):
        future = sampler.sample(PROMPT, 1, PARAMS)
        with anyio.fail_after(60):
            for _ in range(MAX_ATTEMPTS + 1):
                await die_with_a_batch(address, reads=False)
            async with scripted_actor(address, "token", "m"):
                assert len((await future).sequences) == 1
