"""What only a deployment's operator may ask of a broker, with the key that lies in its data folder."""

import secrets

from ..wire import sockets
from ..wire.client_messages import Answer, Drain, Failed, ToClient
from ..wire.codec import MAX_HEADER_BYTES, decode, encode
from ..wire.errors import revive
from ..wire.ids import ActorId
from .probe import probe


async def drain(address: str, server_key: str | None, operator_key: str, actor: ActorId) -> None:
    """Returns when the actor has ended what it holds, saved its runs and left.

    Raises InvalidRequestError for another key, NotFoundError for an actor that is not there, ConnectionLostError where
    nobody answers.
    """
    await probe(address, server_key, timeout_s=10.0)
    identity = b"operator-" + secrets.token_bytes(16)
    request = [encode(Drain(1, operator_key, actor))]
    with sockets.connect(address, server_key.encode() if server_key else None, identity) as channel:
        channel.on_reconnect = lambda: channel.send(request)
        channel.send(request)
        while True:
            for frames in await channel.receive():
                message = decode(frames[0], ToClient, MAX_HEADER_BYTES)
                if isinstance(message, Failed):
                    raise revive(message.error)
                if isinstance(message, Answer):
                    return
