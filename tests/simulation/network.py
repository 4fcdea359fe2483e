"""The network between the broker and its peers: late, lossy where a side crashes, and in order on each connection but
for what its `losses` make of a message now and then."""

import asyncio
import random
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

Receive = Callable[[list[bytes]], None]


class Door:
    """In place of a ROUTER: what `wire.sockets.Channel` offers, on the simulated network."""

    def __init__(self, network: "Network", address: str) -> None:
        self._network, self.address = network, address
        self._arrived: list[list[bytes]] = []
        self._wake = asyncio.Event()
        self.is_open = True

    def send(self, frames: Iterable[bytes]) -> None:
        identity, *rest = frames
        if self.is_open:
            self._network.to_peer(self, identity, rest)

    async def receive(self) -> list[list[bytes]]:
        while not self._arrived:
            await self._wake.wait()
            self._wake.clear()
        arrived, self._arrived = self._arrived, []
        return arrived

    def arrive(self, frames: list[bytes]) -> None:
        self._arrived.append(frames)
        self._wake.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.is_open = False


class Network:
    def __init__(
        self, loop: asyncio.AbstractEventLoop, chance: random.Random, slowness_s: float, losses: float
    ) -> None:
        self._loop, self._chance, self._slowness_s, self.losses = loop, chance, slowness_s, losses
        self._doors: dict[str, Door] = {}
        self._peers: dict[bytes, Receive] = {}
        self._last: dict[tuple[str, bytes], float] = {}
        self._silenced: set[bytes] = set()
        self._cut: set[tuple[Door, bytes]] = set()
        self._kept: set[tuple[bytes, Door | None]] = set()
        self._waiting: dict[str, list[list[bytes]]] = {}

    def bind(self, address: str, _most: int, _keys: object = None, _unread: int = 0) -> Door:
        """In place of `wire.sockets.bind`. What was kept by the peers' sockets meanwhile comes now."""
        door = self._doors[address] = Door(self, address)
        for frames in self._waiting.pop(address, []):
            door.arrive(frames)
        return door

    def cut(self) -> None:
        """The broker is dead: it says nothing any more, and hears nothing."""
        for door in self._doors.values():
            door.is_open = False
        self._doors.clear()

    def join(self, identity: bytes, receive: Receive) -> None:
        self._peers[identity] = receive

    def leave(self, identity: bytes) -> None:
        self._peers.pop(identity, None)

    def to_broker(self, address: str, identity: bytes, frames: list[bytes]) -> None:
        """A broker that crashes loses what came first of what is under way: the peer's socket keeps the rest for the
        next one. A peer that crashes loses what came last."""
        sent_to = self._doors.get(address)

        def arrive() -> None:
            door = self._doors.get(address)
            if identity not in self._peers and self._is_lost(self._silenced, identity):
                return
            if door is not sent_to and not self._is_kept(identity, sent_to):
                return
            if door is None:
                self._waiting.setdefault(address, []).append([identity, *frames])
            else:
                door.arrive([identity, *frames])

        self._later(("to " + address, identity), arrive)

    def to_peer(self, door: Door, identity: bytes, frames: list[bytes]) -> None:
        def arrive() -> None:
            receive = self._peers.get(identity)
            if receive and (door.is_open or not self._is_lost(self._cut, (door, identity))):
                receive(frames)

        self._later(("from " + door.address, identity), arrive)

    def _is_lost(self, lost: set[Any], connection: object) -> bool:
        """From some message on, all of them."""
        if connection not in lost and self._chance.random() < 0.5:
            lost.add(connection)
        return connection in lost

    def _is_kept(self, identity: bytes, sent_to: Door | None) -> bool:
        """Up to some message, none of them; what was sent to nobody is kept."""
        if sent_to is None or (identity, sent_to) in self._kept or self._chance.random() < 0.5:
            self._kept.add((identity, sent_to))
            return True
        return False

    def _later(self, connection: tuple[str, bytes], arrive: Callable[[], None]) -> None:
        chance = self._chance
        delay = self._slowness_s * (0.02 if chance.random() < 0.6 else chance.random())
        at = self._last[connection] = max(self._loop.time() + delay, self._last.get(connection, 0.0) + 1e-6)
        fate = chance.choice(("lost", "repeated", "overtaken")) if chance.random() < self.losses else ""
        if fate != "lost":
            self._loop.call_at(at + (self._slowness_s if fate == "overtaken" else 0.0), arrive)
        if fate == "repeated":
            self._loop.call_at(at + self._slowness_s * chance.random(), arrive)
