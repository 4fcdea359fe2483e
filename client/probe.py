"""Asking a broker how it is, without a key: what health checks of other processes want to know."""

import secrets

import anyio

from ..wire import sockets
from ..wire.client_messages import Answer, Probe, Readiness, ToClient
from ..wire.codec import MAX_HEADER_BYTES, decode, encode
from ..wire.errors import ConnectionLostError


async def probe(address: str, server_key: str | None, timeout_s: float) -> Readiness:
    """How many models are ready, loading and not to be loaded. Raises ConnectionLostError where nobody answers."""
    identity = b"probe-" + secrets.token_bytes(16)
    with sockets.connect(address, server_key.encode() if server_key else None, identity) as channel:
        channel.send([encode(Probe(1))])
        with anyio.move_on_after(timeout_s):
            while True:
                for frames in await channel.receive():
                    if isinstance(decode(frames[0], ToClient, MAX_HEADER_BYTES), Answer):
                        return decode(frames[-1], Readiness)
    raise ConnectionLostError(f"no answer from {address} within {timeout_s:g} s")
