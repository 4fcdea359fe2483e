"""A client of the bare wire that checks nothing before it sends: what a broken or hostile peer could be."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import zmq

from lorry.wire.client_messages import VERSION
from lorry.wire.sequenced import stamp_of


class Raw:
    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket

    @classmethod
    @contextmanager
    def connected(cls, address: str, *, small_buffers: bool = False) -> Iterator["Raw"]:
        """With `small_buffers` what is not read waits at the broker, but for a message and 64 KiB, and what the kernel
        keeps for the sender."""
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.routing_id = b"raw-" + secrets.token_bytes(8)
            socket.linger = 0
            if small_buffers:
                socket.rcvhwm, socket.rcvbuf = 1, 2**16
            socket.connect(address)
            yield cls(socket)

    def send(self, *frames: object) -> None:
        self._socket.send_multipart([f if isinstance(f, bytes) else msgpack.packb(f) for f in frames])

    def hears(self, within_ms: int) -> bool:
        """Whether something has come, or does soon."""
        return bool(self._socket.poll(within_ms))

    def receive(self) -> list[bytes]:
        """The next message, without its stamp: nothing is lost between two processes of a test."""
        while True:
            frames = self._socket.recv_multipart()
            if stamp_of(frames) is None:
                return frames
            if len(frames) > 1:
                return frames[1:]

    def receive_header(self) -> dict[str, Any]:
        return msgpack.unpackb(self.receive()[0])

    def ask(self, *frames: object) -> dict[str, Any]:
        self.send(*frames)
        return self.receive_header()

    def hello(self, key: str, version: int = VERSION) -> dict[str, Any]:
        return self.ask({"type": "hello", "version": version, "api_key": key, "client": "raw"})
