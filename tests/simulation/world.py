"""What a history is made of: the loop, chance, the network, the disk, and what went before."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio
from anyio import CapacityLimiter

from .clock import VirtualLoop
from .disk import CrashedError, Memory
from .history import History
from .network import Network

T = TypeVar("T")

CLIENTS, ACTORS = "sim://clients", "sim://actors"
MODEL, TOKEN = "sim/model", "token"

Deaths = Literal["none", "few", "poison"]


@dataclass(frozen=True, slots=True)
class Flavour:
    """What kind of a history it is: few of them have everything in them, so that each promise is tried in earnest.

    `files`: nearly all that is journalled lies in files beside the database. `reads`: the broker holds no payload, and
    reads it again when its turn comes. `losses`: how often a message is lost, repeated or overtaken. `sheds`: what was
    loaded is often deleted. `reinforces`: every third command saves weights without a name, which are sampled from.
    `spreads`: whatever several actors can execute together, they do.
    `deaths` few: fewer than it takes to blame a command. poison: nothing but a command that kills.
    """

    tenants: int
    actors: int
    length: int
    slowness_s: float
    disk_s: float
    span_s: float
    snapshots: float
    crashes: int
    deaths: Deaths
    damages: bool
    strangers: bool
    files: bool
    reads: bool
    losses: float
    sheds: bool
    reinforces: bool
    spreads: bool = False

    @classmethod
    def drawn(cls, chance: random.Random) -> "Flavour":
        return cls(
            tenants=chance.choice((1, 1, 2, 3)),
            actors=chance.choice((1, 1, 2)),
            length=chance.choice((4, 8, 12, 16)),
            slowness_s=chance.choice((0.01, 0.3, 1.5)),
            disk_s=chance.choice((0.01, 0.1, 1.0)),
            span_s=chance.choice((1.0, 4.0, 15.0, 60.0)),
            snapshots=chance.choice((0.0, 0.3, 0.8)),
            crashes=chance.choice((0, 1, 1, 2, 3)),
            deaths=chance.choice(("none", "few", "few", "few", "poison")),
            damages=chance.random() < 0.4,
            strangers=chance.random() < 0.3,
            files=chance.random() < 0.5,
            reads=chance.random() < 0.5,
            losses=chance.choice((0.0, 0.0, 0.02, 0.1)),
            sheds=chance.random() < 0.2,
            reinforces=chance.random() < 0.2,
        )


class World:
    heartbeat_s = 5.0

    def __init__(self, seed: int, loop: VirtualLoop, disk: Memory, folder: Path) -> None:
        self.chance = random.Random(seed)
        self.flavour = Flavour.drawn(self.chance)
        if random.Random(f"{seed}, whether it spreads").random() < 0.25:  # other histories are what they were
            self.flavour = replace(self.flavour, spreads=True, actors=3)
        self.loop, self.disk, self.folder, self.history = loop, disk, folder, History(seed)
        self.network = Network(loop, random.Random(self.chance.random()), self.flavour.slowness_s, self.flavour.losses)
        disk.chance = self.chance
        self.broker: anyio.CancelScope | None = None
        self.damaged: set[str] = set()
        self.draws = random.Random(self.chance.random())
        """For the broker's own ids, so that its look-ups do not change who does what."""
        self._threads = random.Random(self.chance.random())

    def note(self, what: str, **facts: Any) -> None:
        self.history.note(self.loop.time(), what, **facts)

    async def pause(self, longest_s: float) -> None:
        await anyio.sleep(longest_s * self.chance.random() ** 2)

    def crash(self, where: str) -> None:
        """The broker's process ends here and now."""
        if self.broker is not None and not self.broker.cancel_called:
            self.note("crash", where=where)
            self.network.cut()
            self.broker.cancel()

    async def in_thread(
        self, call: Callable[..., T], *arguments: Any, limiter: CapacityLimiter | None = None, **_options: object
    ) -> T:
        """In place of `anyio.to_thread.run_sync`: somewhere between two delays, all at once."""
        if limiter is None:
            return await self._delayed(call, *arguments)
        async with limiter:
            return await self._delayed(call, *arguments)

    async def _delayed(self, call: Callable[..., T], *arguments: Any) -> T:
        await self._disk_takes()
        self.disk.is_in_thread = True
        try:
            result = call(*arguments)
        except CrashedError:
            self.disk.is_in_thread = False
            self.crash("in a transaction")
            await anyio.sleep_forever()
            raise
        finally:
            self.disk.is_in_thread = False
        await self._disk_takes()
        return result

    async def _disk_takes(self) -> None:
        await anyio.sleep(0.0 if self._threads.random() < 0.4 else self.flavour.disk_s * self._threads.random() ** 2)
