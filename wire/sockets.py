"""ZeroMQ sockets on the event loop. Receiving wakes when there is something and takes all of it; sending never blocks.

ZeroMQ's descriptor is edge-triggered: it speaks up once for any number of messages, and a send may swallow that. So a
channel drains whenever it wakes, and looks again after every send.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self, cast

import zmq

from .errors import InvalidRequestError

_CONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED
# As numbers: with every message pyzmq's own would be looked up, and put together, as members of an Enum.
_NOBLOCK, _NOBLOCK_AND_MORE, _POLLIN = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.POLLIN)
_EVENTS, _RCVMORE = int(zmq.EVENTS), int(zmq.RCVMORE)

DRAIN_AT_MOST = 1000
"""Messages taken in one go, so that a flood on one socket does not starve the loop's other tasks."""


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """A CURVE key pair in ZeroMQ's Z85 text form."""

    public: bytes
    secret: bytes

    @classmethod
    def generate(cls) -> "CurveKeys":
        return cls(*zmq.curve_keypair())


class Channel:
    """One socket, owned by one event loop; use it as a context manager.

    One that has a `peer` calls `on_reconnect` whenever it is connected again: what was under way then may be lost.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", peer: str | None = None) -> None:
        self._socket, self._peer = socket, peer
        self.on_reconnect: Callable[[], None] = _nothing
        self._wake = asyncio.Event()
        self._wake.set()
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(socket.FD)
        self._loop.add_reader(self._descriptor, self._wake.set)
        self._monitor = socket.get_monitor_socket(_CONNECTED) if peer else None
        self._was_connected = False
        if self._monitor is not None:
            self._loop.add_reader(int(self._monitor.FD), self._connected)
            self._connected()  # its descriptor says nothing before somebody has looked

    def _connected(self) -> None:
        while self._monitor is not None and int(self._monitor.EVENTS) & zmq.POLLIN:
            self._monitor.recv_multipart(zmq.NOBLOCK)
            if self._was_connected:
                self.on_reconnect()
            self._was_connected = True

    def reconnect(self) -> None:
        """Give up a connection that has been silent: nobody says of every one that it is dead. What waits to be sent
        is lost with it."""
        assert self._peer is not None
        self._socket.disconnect(self._peer)
        self._socket.connect(self._peer)

    def send(self, frames: Iterable[bytes]) -> None:
        """Queue one message. A message to a peer that has gone, or that refused the connection, is dropped."""
        *others, last = frames
        with suppress(zmq.Again):
            for frame in others:
                self._socket.send(frame, _NOBLOCK_AND_MORE)
            self._socket.send(last, _NOBLOCK)
        self._wake.set()

    async def receive(self) -> list[list[bytes]]:
        """Wait for messages and take all that are there (up to DRAIN_AT_MOST)."""
        while True:
            if messages := self._drain():
                return messages
            await self._wake.wait()
            self._wake.clear()

    def _drain(self) -> list[list[bytes]]:
        messages: list[list[bytes]] = []
        socket = self._socket
        while len(messages) < DRAIN_AT_MOST and cast(int, socket.getsockopt(_EVENTS)) & _POLLIN:
            frames = [socket.recv(_NOBLOCK)]
            while socket.getsockopt(_RCVMORE):
                frames.append(socket.recv(_NOBLOCK))
            messages.append(frames)
        return messages

    @property
    def address(self) -> str:
        """Where a bound socket listens, with the port that the system chose."""
        return cast(bytes, self._socket.LAST_ENDPOINT).decode().rstrip("\0")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.remove_reader(self._descriptor)
        if self._monitor is not None:
            self._loop.remove_reader(int(self._monitor.FD))
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        self._socket.close(linger=200)


def bind(address: str, max_frame_bytes: int, keys: CurveKeys | None = None, unread_at_most: int = 0) -> Channel:
    """A ROUTER at `address`. Peers that send a frame above `max_frame_bytes` are cut off by ZeroMQ itself. Of each peer
    about `unread_at_most` messages wait to be read, and it is to wait with the others; 0 is any number.

    Raises InvalidRequestError for an address that is malformed or taken.
    """

    def prepare(socket: "zmq.Socket[bytes]") -> None:
        socket.maxmsgsize = max_frame_bytes
        socket.router_handover = True
        socket.rcvhwm = unread_at_most
        if keys:
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
        socket.bind(address)

    return _channel(zmq.ROUTER, prepare, "bind", address)


def connect(address: str, server_key: bytes | None, identity: bytes) -> Channel:
    """A DEALER to `address`, which need not be there yet; encrypted where the server's public key is given.

    `identity` names the connection across reconnects. It is as good as a password: make it random.
    Raises InvalidRequestError for a malformed address.
    """

    def prepare(socket: "zmq.Socket[bytes]") -> None:
        socket.routing_id = identity
        socket.reconnect_ivl, socket.reconnect_ivl_max = 50, 1000
        if server_key:
            own = CurveKeys.generate()
            socket.curve_serverkey = server_key
            socket.curve_publickey, socket.curve_secretkey = own.public, own.secret
        socket.get_monitor_socket(_CONNECTED)  # before there is anything to be seen
        socket.connect(address)

    return _channel(zmq.DEALER, prepare, "address", address, peer=address)


def _channel(
    kind: int, prepare: Callable[["zmq.Socket[bytes]"], None], field: str, address: str, peer: str | None = None
) -> Channel:
    socket = zmq.Context.instance().socket(kind)
    try:
        socket.set_hwm(0)
        prepare(socket)
        return Channel(socket, peer)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        is_taken = error.errno == zmq.EADDRINUSE
        way_out = "; another Lorry may listen there: stop that, or name another address" if is_taken else ""
        raise InvalidRequestError(f"{field} is {address!r}: {error}{way_out}", field=field) from None
    except BaseException:
        socket.close(linger=0)
        raise


def _nothing() -> None:
    pass
