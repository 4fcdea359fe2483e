"""An actor that is refused is told so each time that it asks; the log tells of it once."""

import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from lorry.scheduler import actor_door, broker
from lorry.scheduler.config import BrokerConfig
from lorry.wire import sockets
from lorry.wire.actor_messages import VERSION, ActorHello, ActorPing, ActorWelcome, Capacity, Expelled, ToActor
from lorry.wire.codec import decode, encode
from lorry.wire.ids import ActorId
from lorry.wire.sockets import Channel

from .scripted import FACTS

CAPACITY = Capacity(slots=8, token_budget=1 << 20, sample_rows=64, max_rank=64)


def hello(token: str) -> ActorHello:
    return ActorHello(VERSION, token, ActorId("refused"), "m", CAPACITY, FACTS, os.getpid())


@asynccontextmanager
async def serving(data: Path) -> AsyncGenerator[str]:
    config = BrokerConfig(data, ("m",), "token", bind="tcp://127.0.0.1:*", heartbeat_s=60)
    async with broker.running(config) as addresses:
        yield addresses.actors


async def ask(channel: Channel, message: ActorHello | ActorPing) -> ToActor:
    channel.send([encode(message)])
    ((header, *_),) = await channel.receive()
    return decode(header, ToActor)


@contextmanager
def refusals() -> Iterator[list[str]]:
    told: list[str] = []
    with capture_logs() as logs:
        yield told
    told += [entry["reason"] for entry in logs if entry["event"] == "actor refused"]


async def test_the_log_tells_once_of_each_connection_that_is_refused(tmp_path: Path) -> None:
    with refusals() as told:
        async with serving(tmp_path) as address:
            for identity in (b"one", b"other"):
                with sockets.connect(address, None, identity) as channel:
                    for _ in range(3):
                        assert isinstance(await ask(channel, hello("wrong")), Expelled)
    assert told == ["the actor's token is wrong"] * 2


async def test_who_joined_meanwhile_is_told_of_again(tmp_path: Path) -> None:
    with refusals() as told:
        async with serving(tmp_path) as address:
            with sockets.connect(address, None, b"early") as channel:
                assert isinstance(await ask(channel, ActorPing()), Expelled)
                assert isinstance(await ask(channel, hello("token")), ActorWelcome)
                for _ in range(2):
                    assert isinstance(await ask(channel, hello("wrong")), Expelled)
    assert told == ["the broker does not know this actor", "the actor's token is wrong"]


async def test_what_is_remembered_of_the_refused_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_door, "_REFUSED_AT_MOST", 2)
    with refusals() as told:
        async with serving(tmp_path) as address:
            for identity in (b"a", b"b", b"c", b"a", b"a"):
                with sockets.connect(address, None, identity) as channel:
                    assert isinstance(await ask(channel, hello("wrong")), Expelled)
    assert len(told) == 4, "the first is forgotten, and told of again"
