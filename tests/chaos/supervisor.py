"""`python -m tests.chaos.supervisor SEED serve ...`: `lorry serve` as it is, but for networks between its processes.

They lose, repeat and delay messages, and cut connections. Their chance begins with SEED.
"""

import sys
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
from anyio.abc import TaskGroup, TaskStatus

from lorry import serve
from lorry.cli import app
from lorry.config import ServeConfig
from tests.network.cables import Cables, bad_at_connections
from tests.network.messages import Mischief, bad_at_messages

CUTS_AFTER = (20_000, 400_000)


def bad(seed: int) -> Mischief:
    return Mischief(lost=0.01, repeated=0.05, delayed=0.1, seed=seed)


async def _hold(network: AbstractAsyncContextManager[str], *, task_status: TaskStatus[str]) -> None:
    async with network as address:
        task_status.started(address)
        await anyio.sleep_forever()


async def _in_front_of(door: str, tasks: TaskGroup, seed: int) -> str:
    far: str = await tasks.start(_hold, bad_at_messages(door, bad(seed)))
    return await tasks.start(_hold, bad_at_connections(Cables(far, seed, CUTS_AFTER)))


def patch(seed: int) -> None:
    """Actors and gateways are told another address than the broker's own."""
    start, actor_command, gateway_command = serve._start, serve._actor_command, serve._gateway_command
    doors: dict[str, str] = {}

    async def _start(tasks: TaskGroup, config: ServeConfig, actor_address: str, environment: Any) -> Any:
        doors["actors"] = await _in_front_of(actor_address, tasks, seed)
        doors["clients"] = await _in_front_of(config.bind, tasks, seed + 1)
        return await start(tasks, config, actor_address, environment)

    def _actor_command(config: Any, actor: Any, connect: str) -> list[str]:
        return actor_command(config, actor, doors["actors"])

    def _gateway_command(config: Any, http: str, announced: dict[str, str]) -> list[str]:
        return gateway_command(config, http, announced | {"clients": doors["clients"]})

    serve._start, serve._actor_command, serve._gateway_command = _start, _actor_command, _gateway_command


if __name__ == "__main__":
    patch(int(sys.argv.pop(1)))
    app()
