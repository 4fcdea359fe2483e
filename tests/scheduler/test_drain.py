"""An actor that is told to leave has left in good order, or its operator is told what else became of it."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from lorry.client.operator import drain
from lorry.scheduler import broker
from lorry.scheduler.broker import Addresses
from lorry.scheduler.config import BrokerConfig
from lorry.wire.errors import ActorLostError, NotFoundError, OutcomeUnknownError
from lorry.wire.ids import ActorId
from tests.network.cables import Cables, bad_at_connections

from .scripted import ScriptedActor, scripted_actor

SCRIPTED = ActorId("scripted")


@asynccontextmanager
async def serving(data: Path) -> AsyncGenerator[tuple[Addresses, ScriptedActor]]:
    config = BrokerConfig(data, ("m",), "token", bind="tcp://127.0.0.1:*", heartbeat_s=60, operator_key="key")
    async with broker.running(config) as addresses, scripted_actor(addresses.actors, "token", "m") as actor:
        yield addresses, actor


async def until_there_are(addresses: Addresses, those: str) -> None:
    """As the broker sees it: a name that is not there is answered with those that are."""
    while True:
        with pytest.raises(NotFoundError) as refused:
            await drain(addresses.clients, None, "key", ActorId("nobody"))
        if f"there are: {those}" in str(refused.value):
            return


async def test_an_actor_that_left_in_good_order_has_left(tmp_path: Path) -> None:
    async with serving(tmp_path) as (addresses, actor), anyio.create_task_group() as tasks:
        await until_there_are(addresses, SCRIPTED)
        tasks.start_soon(drain, addresses.clients, None, "key", SCRIPTED)
        await actor.is_to_leave.wait()
        actor.leave()


async def test_an_actor_that_died_meanwhile_has_not_left(tmp_path: Path) -> None:
    async with serving(tmp_path) as (addresses, actor), anyio.create_task_group() as tasks:
        await until_there_are(addresses, SCRIPTED)

        async def replace() -> None:
            await actor.is_to_leave.wait()
            async with scripted_actor(addresses.actors, "token", "m"):
                await anyio.sleep_forever()

        tasks.start_soon(replace)
        with pytest.raises(ActorLostError, match="'scripted' was lost before it had left: it was replaced") as lost:
            await drain(addresses.clients, None, "key", SCRIPTED)
        assert "make a new run" not in str(lost.value), "that is what a run's owner is told"
        tasks.cancel_scope.cancel()


async def test_what_became_of_an_actor_while_there_was_no_connection_is_not_known(tmp_path: Path) -> None:
    async with serving(tmp_path) as (addresses, actor):
        await until_there_are(addresses, SCRIPTED)
        cables = Cables(addresses.clients)

        async def leave_unheard() -> None:
            await actor.is_to_leave.wait()
            cables.is_down = True
            cables.cut()
            actor.leave()
            await until_there_are(addresses, "none")
            cables.is_down = False

        async with bad_at_connections(cables) as address, anyio.create_task_group() as tasks:
            tasks.start_soon(leave_unheard)
            with pytest.raises(OutcomeUnknownError, match="whether it saved its runs first is not known"):
                await drain(address, None, "key", SCRIPTED)
