"""What goes wrong in a history, and when: brokers and actors that end, fall silent or leave, and files that rot."""

from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from lorry.wire.actor_messages import Capacity

from .actor import Actor
from .states import FILE
from .world import World


class Faults:
    def __init__(self, world: World, tasks: TaskGroup) -> None:
        self._world, self._tasks, self._chance = world, tasks, world.chance
        self._actors: dict[str, Actor] = {}
        self._is_peace = False

    def start_actors(self) -> None:
        for i in range(self._world.flavour.actors):
            self._tasks.start_soon(self._processes, f"actor-{i}")

    async def _processes(self, name: str) -> None:
        """One process after another: under the same name, or another."""
        chance, started = self._chance, 0
        while True:
            started += 1
            shown = name if chance.random() < 0.7 else f"{name}.{started}"
            capacity = Capacity(
                chance.choice((1, 2, 4)), chance.choice((8, 40)), 2, 64, credits=chance.choice((1, 2, 3))
            )
            actor = self._actors[name] = Actor(self._world, shown, f"{name}/{started}".encode(), capacity)
            await actor.live()
            await self._world.pause(5.0)

    async def run(self) -> None:
        """All at once; each at its own time."""
        flavour = self._world.flavour
        async with anyio.create_task_group() as tasks:
            for _ in range(flavour.crashes):
                tasks.start_soon(self._crash)
            for _ in range(2 if flavour.deaths == "few" else 0):
                tasks.start_soon(self._harm_actor)
            for _ in range(2 if flavour.damages else 0):
                tasks.start_soon(self._damage)

    async def peace(self) -> None:
        self._is_peace = True
        self._world.disk.countdown = None
        self._world.network.losses = 0.0
        for actor in self._actors.values():
            actor.is_silent = False

    async def _crash(self) -> None:
        """At any moment, or at one of the next statements that the database gets."""
        await anyio.sleep(self._world.flavour.span_s * self._chance.random())
        if self._chance.random() < 0.4:
            self._world.crash("at any moment")
        else:
            self._world.disk.countdown = self._chance.randrange(1, 60)

    async def _harm_actor(self) -> None:
        await anyio.sleep(self._world.flavour.span_s * self._chance.random())
        actor = self._actors[self._chance.choice(list(self._actors))]
        kind = self._chance.choice(("dies", "dies", "dies", "leaves", "is silent"))
        if kind == "dies":
            actor.die("killed")
        elif kind == "leaves":
            actor.leave()
        else:
            self._world.note("silent", actor=str(actor))
            actor.is_silent = True
            await anyio.sleep(25.0)
            actor.is_silent = False

    async def _damage(self) -> None:
        """The newest snapshot of one run, if there is another state to fall back to; often noticed at once."""
        await anyio.sleep(self._world.flavour.span_s * self._chance.random())
        for run, newest, former in self._world.disk.restore_points():
            if newest and "/snapshots/" in newest and newest != former and run not in self._world.damaged:
                self._world.damaged.add(run)
                self._world.note("damages", run=run, folder=newest[-6:])
                file = Path(newest) / FILE
                if file.exists():
                    file.write_text("rotten")
                if self._chance.random() < 0.7:
                    self._world.crash("behind a damage")
                return
