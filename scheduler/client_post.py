"""What goes out to clients: over the link of their session where they have one, bare where they have none."""

from collections.abc import Callable, Iterable
from typing import TypeAlias

from ..wire.client_messages import Answer, NewsCame, Resolved, Streamed, ToClient
from ..wire.codec import encode
from ..wire.errors import ErrorInfo
from ..wire.ids import FutureId
from ..wire.news import Followed
from ..wire.sequenced import Link
from ..wire.sockets import Channel
from .access.sessions import Session, Sessions

SoFar: TypeAlias = Callable[[FutureId], Iterable[bytes]]

_NAMES_AT_ONCE = 500
"""Of futures, in one message."""


class ClientPost:
    def __init__(self, channel: Channel, sessions: Sessions) -> None:
        self._channel, self._sessions = channel, sessions

    def link(self, connection: bytes, name: str) -> Link:
        return Link(lambda frames: self._channel.send([connection, *frames]), name, bounds=True)

    def bare(self, connection: bytes, message: ToClient) -> None:
        self._channel.send([connection, encode(message)])

    def send(self, connection: bytes, message: ToClient, *payload: bytes) -> None:
        self._put(connection, [encode(message), *payload])

    def answer(self, connection: bytes, request: int, payload: object = None) -> None:
        self.send(connection, Answer(request), b"" if payload is None else encode(payload))

    def deliver(self, connections: Iterable[bytes], future: FutureId, error: ErrorInfo | None, payload: bytes) -> bool:
        """Whether anybody has it now who is not to say so himself. Who does not keep up is to get it later, from the
        journal."""
        header, has_it = encode(Resolved(future, error)), False
        for connection in connections:
            session = self._sessions.at(connection)
            if session:
                session.behind.discard(future)
            if session and not session.is_next(future):
                session.unsent[future] = None
            else:
                self._put(connection, [header, payload])
                has_it = has_it or (session is not None and not session.relays)
        return has_it

    def stream(self, connection: bytes, told: Iterable[tuple[FutureId, bytes]], so_far: SoFar) -> None:
        """Tokens of samples that are not over. Who does not keep up gets none, and then all that there are by then."""
        session = self._sessions.at(connection)
        if session is not None and not session.link.has_room:
            session.behind.update(future for future, _ in told)
            return
        sent: list[tuple[FutureId, bytes]] = []
        for future, pieces in told:
            if session is not None and future in session.behind:
                session.behind.discard(future)
                sent += [(future, each) for each in so_far(future)]
            else:
                sent.append((future, pieces))
        for start in range(0, len(sent), _NAMES_AT_ONCE):
            some = sent[start : start + _NAMES_AT_ONCE]
            header = encode(Streamed([future for future, _ in some]))
            self._put(connection, [header, *(pieces for _, pieces in some)])

    def news(self, session: Session, of: Followed, news: bytes) -> int:
        """Which message of its link it is, by which is known when the client has it."""
        return session.link.send([encode(NewsCame(of)), news])

    def _put(self, connection: bytes, frames: list[bytes]) -> None:
        if session := self._sessions.at(connection):
            session.link.send(frames)
        else:
            self._channel.send([connection, *frames])
