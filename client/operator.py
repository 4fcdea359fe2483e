"""What only a deployment's operator may ask of a broker, with the key that lies in its data folder."""

import secrets

from ..wire import sockets
from ..wire.client_messages import Answer, Drain, Failed, ToClient
from ..wire.codec import MAX_HEADER_BYTES, decode, encode
from ..wire.errors import NotFoundError, OutcomeUnknownError, revive
from ..wire.ids import ActorId
from .probe import probe


async def drain(address: str, server_key: str | None, operator_key: str, actor: ActorId) -> None:
    """Returns when the actor has ended what it holds, saved its runs and left.

    Raises InvalidRequestError for another key, NotFoundError for an actor that is not there, ActorDiedError for one
    that was lost before it had left, OutcomeUnknownError where it went while there was no connection, and
    ConnectionLostError where nobody answers.
    """
    await probe(address, server_key, timeout_s=10.0)
    identity = b"operator-" + secrets.token_bytes(16)
    request = [encode(Drain(1, operator_key, actor))]
    with sockets.connect(address, server_key.encode() if server_key else None, identity) as channel:
        was_cut = False

        def ask_again() -> None:
            nonlocal was_cut
            was_cut = True
            channel.send(request)

        channel.on_reconnect = ask_again
        channel.send(request)
        while True:
            for frames in await channel.receive():
                message = decode(frames[0], ToClient, MAX_HEADER_BYTES)
                if isinstance(message, Failed) and was_cut and message.error.code == NotFoundError.__name__:
                    problem = (
                        f"the connection to {address} was lost while actor {actor!r} was to leave, and it is not there"
                        " any more: whether it saved its runs first is not known"
                    )
                    raise OutcomeUnknownError(problem, field="actor")
                if isinstance(message, Failed):
                    raise revive(message.error)
                if isinstance(message, Answer):
                    return
