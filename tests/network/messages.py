"""A network that is bad at messages: between two processes it loses, repeats, delays and so reorders whole ones.

ZeroMQ over TCP reorders and repeats nothing, and loses only what is under way when a connection ends; whoever survives
this survives that.
"""

import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import anyio
import zmq
from anyio.abc import TaskGroup

from lorry.wire import sockets
from lorry.wire.sockets import Channel
from lorry.wire.tasks import background_tasks

_GONE_AFTER_S = 30.0
"""A peer that was sent nothing for so long is gone: whoever is there hears heartbeats."""


@dataclass(slots=True)
class Mischief:
    """How likely each thing happens to a message. May be changed at any moment; all zero is a good network."""

    lost: float = 0.0
    repeated: float = 0.0
    delayed: float = 0.0
    delay_s: float = 0.05
    seed: int = 0
    done: dict[str, int] = field(default_factory=lambda: {"lost": 0, "repeated": 0, "delayed": 0})
    _chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def fates(self) -> list[float]:
        """After how many seconds each copy arrives; none for a message that is lost."""
        fates: list[float] = []
        for _ in range(1 + self._happens("repeated", self.repeated)):
            if self._happens("lost", self.lost):
                continue
            late = self._happens("delayed", self.delayed)
            fates.append(self._chance.uniform(0, self.delay_s) if late else 0.0)
        return fates

    def _happens(self, what: str, likely: float) -> bool:
        happens = self._chance.random() < likely
        self.done[what] += happens
        return happens


class _Proxy:
    def __init__(self, front: Channel, behind: str, mischief: Mischief, tasks: TaskGroup) -> None:
        self._front, self._behind, self._mischief, self._tasks = front, behind, mischief, tasks
        self._backs: dict[bytes, Channel] = {}

    async def serve(self) -> None:
        while True:
            for identity, *frames in await self._front.receive():
                if identity not in self._backs:
                    await self._tasks.start(self._connected, identity)
                self._pass_on(self._backs[identity], frames)

    async def _connected(self, identity: bytes, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        with sockets.connect(self._behind, None, identity) as back:
            self._backs[identity] = back
            task_status.started()
            silent = False
            while not silent:
                with anyio.move_on_after(_GONE_AFTER_S) as waiting:
                    for frames in await back.receive():
                        self._pass_on(self._front, [identity, *frames])
                silent = waiting.cancelled_caught
            del self._backs[identity]

    def _pass_on(self, channel: Channel, frames: list[bytes]) -> None:
        for delay_s in self._mischief.fates():
            if delay_s:
                self._tasks.start_soon(self._later, channel, frames, delay_s)
            else:
                channel.send(frames)

    async def _later(self, channel: Channel, frames: list[bytes], delay_s: float) -> None:
        await anyio.sleep(delay_s)
        with suppress(zmq.ZMQError):  # it was closed meanwhile: the message is lost
            channel.send(frames)


@asynccontextmanager
async def bad_at_messages(behind: str, mischief: Mischief) -> AsyncGenerator[str]:
    """The address in front of `behind`, for as long as the block lasts."""
    with sockets.bind("tcp://127.0.0.1:*", 2**30) as front:
        async with background_tasks() as tasks:
            tasks.start_soon(_Proxy(front, behind, mischief, tasks).serve)
            yield front.address
