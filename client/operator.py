"""What only a deployment's operator may ask of a broker, with the key that lies in its data folder."""

import secrets
from dataclasses import dataclass

from ..wire import sockets
from ..wire.admin_messages import Administer, AdminOrder
from ..wire.client_messages import AdapterImported, Answer, Drain, Failed, ImportAdapter, ToClient
from ..wire.codec import MAX_HEADER_BYTES, decode, encode
from ..wire.errors import LorryError, NotFoundError, OutcomeUnknownError, revive
from ..wire.ids import ActorId
from .probe import probe


async def drain(address: str, server_key: str | None, operator_key: str, actor: ActorId) -> None:
    """Returns when the actor has ended what it holds, saved its runs and left.

    Raises InvalidRequestError for another key, NotFoundError for an actor that is not there, ActorDiedError for one
    that was lost before it had left, OutcomeUnknownError where it went while there was no connection, and
    ConnectionLostError where nobody answers.
    """
    order = Drain(1, operator_key, actor)
    reply = await _ask(address, server_key, order)
    if reply.error is None:
        return
    if reply.was_cut and isinstance(reply.error, NotFoundError):
        problem = (
            f"the connection to {address} was lost while actor {actor!r} was to leave, and it is not there"
            " any more: whether it saved its runs first is not known"
        )
        raise OutcomeUnknownError(problem, field="actor")
    raise reply.error


async def import_adapter(address: str, server_key: str | None, order: ImportAdapter) -> AdapterImported:
    """Returns once the adapter's checkpoints are recorded.

    Raises InvalidRequestError for another key, a name that none can have, or an adapter that the base model's actors
    could not make, UnknownModelError, NotFoundError for a tenant or folder that is not there, StorageUnavailableError,
    and ConnectionLostError where nobody answers.
    """
    reply = await _ask(address, server_key, order)
    if reply.error is not None:
        raise reply.error
    return decode(reply.payload, AdapterImported)


async def administer(address: str, server_key: str | None, operator_key: str, order: AdminOrder) -> bytes:
    """Returns once it is carried out, and durable: the encoded answer, empty where there is none.

    Raises InvalidRequestError for another key or for what cannot be, NotFoundError for a key or a tenant that is not
    there, StorageUnavailableError, and ConnectionLostError where nobody answers.
    """
    reply = await _ask(address, server_key, Administer(1, order, operator_key))
    if reply.error is not None:
        raise reply.error
    return reply.payload


@dataclass(frozen=True, slots=True)
class _Reply:
    """`was_cut`: the order was sent more than once, for the connection was lost meanwhile."""

    payload: bytes
    error: LorryError | None
    was_cut: bool


async def _ask(address: str, server_key: str | None, order: Drain | ImportAdapter | Administer) -> _Reply:
    """Raises ConnectionLostError where nobody is there to be asked."""
    await probe(address, server_key, timeout_s=10.0)
    identity = b"operator-" + secrets.token_bytes(16)
    request = [encode(order)]
    with sockets.connect(address, server_key.encode() if server_key else None, identity) as channel:
        was_cut = False

        def ask_again() -> None:
            nonlocal was_cut
            was_cut = True
            channel.send(request)

        channel.on_reconnect = ask_again
        channel.send(request)
        while True:
            for header, *payloads in await channel.receive():
                match decode(header, ToClient, MAX_HEADER_BYTES):
                    case Failed(_, error):
                        return _Reply(b"", revive(error), was_cut)
                    case Answer():
                        return _Reply(payloads[0] if payloads else b"", None, was_cut)
                    case _:
                        pass
