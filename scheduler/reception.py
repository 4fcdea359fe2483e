"""Who says hello: a right key gets a session, a wrong one a typed error, and who shows many wrong ones waits.

What is known of somebody without a key is the connection, which costs nothing to open anew. So a connection has few
wrong tries; and over however many of them keys come that nobody knows, one at a time is looked up, beside all else that
is read, and so many wait for that. A key that was right is looked up at once.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import anyio
from anyio.abc import TaskGroup

from ..storage.rows import KeyRow
from ..storage.writer import Writer
from ..wire.attempts import Attempts, Lately
from ..wire.client_messages import VERSION, Failed, Hello, Welcome
from ..wire.errors import AuthenticationError, LorryError, ProtocolError, TooManyTriesError, TooManyWaitingError
from ..wire.ids import SessionId
from .access.keyring import Keyring, revoked
from .access.sessions import Session, Sessions
from .client_post import ClientPost
from .config import BrokerConfig

_KEYS_AT_MOST = 10_000
_UNKNOWN_AT_MOST = 1_000
"""Keys that wait to be looked up."""
_AGAIN_S = 1.0
_REFUSED_AFTER_S = 0.005


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a welcome says, and how many of a tenant's may be open."""

    heartbeat_s: float
    max_payload_bytes: int
    sessions_per_tenant: int

    @classmethod
    def of(cls, config: BrokerConfig) -> "Bounds":
        return cls(config.heartbeat_s, config.max_payload_bytes, config.sessions_per_tenant)


class Reception:
    """`left` is called with the session that a connection had before it came with another key."""

    def __init__(
        self,
        keyring: Keyring,
        sessions: Sessions,
        post: ClientPost,
        writer: Writer,
        tasks: TaskGroup,
        now: Callable[[], float],
        monotonic: Callable[[], float],
        bounds: Bounds,
        left: Callable[[Session], None],
    ) -> None:
        self._keyring, self._sessions, self._post, self._writer = keyring, sessions, post, writer
        self._tasks, self._now, self._monotonic, self._bounds = tasks, now, monotonic, bounds
        self._left = left
        self._attempts = Attempts()
        self._right = Lately[bool](_KEYS_AT_MOST, math.inf)
        self._one_unknown, self._unknown = anyio.Semaphore(1), 0
        self._put_off: set[bytes] = set()

    def hear(self, connection: bytes, hello: Hello) -> None:
        """It is answered now, or when its key has been looked up."""
        hash_ = self._keyring.hash_of(hello.api_key)
        if hello.version != VERSION:
            problem = f"the client speaks version {hello.version} of the protocol, the broker version {VERSION}"
            self._refuse(connection, ProtocolError(problem, field="version"))
        elif hash_ is not None and self._right.of(hash_, self._monotonic()):
            self._tasks.start_soon(self._look_up, connection, hello)
        elif connection in self._put_off:
            pass  # it is about to be told
        elif after_s := self._attempts.take(connection.hex(), self._monotonic()):
            self._put_off.add(connection)
            self._tasks.start_soon(self._refuse_later, connection, after_s)
        elif hash_ is None:
            self._refuse(connection, _unknown(hello))
        elif self._unknown >= _UNKNOWN_AT_MOST:
            problem = f"{self._unknown:,} keys that nobody knows wait to be looked up"
            self._refuse(connection, TooManyWaitingError(problem, field="api_key", after_s=_AGAIN_S))
        else:
            self._unknown += 1
            self._tasks.start_soon(self._look_up_in_turn, connection, hello)

    async def _refuse_later(self, connection: bytes, after_s: float) -> None:
        """Whoever tries as fast as it goes takes no time from others."""
        await anyio.sleep(_REFUSED_AFTER_S)
        self._put_off.discard(connection)
        problem = "too many wrong keys came over this connection"
        self._refuse(connection, TooManyTriesError(problem, field="api_key", after_s=after_s))

    async def _look_up_in_turn(self, connection: bytes, hello: Hello) -> None:
        try:
            async with self._one_unknown:
                is_right = await self._look_up(connection, hello)
        finally:
            self._unknown -= 1
        if is_right:
            self._attempts.give_back(connection.hex(), self._monotonic())

    async def _look_up(self, connection: bytes, hello: Hello) -> bool:
        """Whether the key is right."""
        key = await self._keyring.find(hello.api_key)
        if key is None:
            self._refuse(connection, _unknown(hello))
        elif over := self._keyring.over(key):
            self._right.forget(key.hash)
            self._refuse(connection, over)
        elif self._sessions.is_revoked(key.hash):  # it was looked up before
            self._right.forget(key.hash)
            self._refuse(connection, revoked(key))
        else:
            self._right.say(key.hash, True, self._monotonic())
            self._welcome(connection, key, hello)
            return True
        return False

    def _welcome(self, connection: bytes, key: KeyRow, hello: Hello) -> None:
        session, bounds = self._sessions.at(connection), self._bounds
        if session is None or session.key.hash != key.hash:
            if (others := self._sessions.open_of(key.tenant)) >= bounds.sessions_per_tenant:
                problem = f"tenant {key.tenant!r} has {others:,} connections open, which is the limit"
                again = TooManyWaitingError(problem, field="sessions_per_tenant", after_s=bounds.heartbeat_s)
                self._refuse(connection, again)
                return
            session = self._begin(connection, key, hello)
        self._post.bare(connection, Welcome(session.id, bounds.heartbeat_s, bounds.max_payload_bytes))

    def _begin(self, connection: bytes, key: KeyRow, hello: Hello) -> Session:
        id_ = SessionId("session-" + secrets.token_hex(8))
        link = self._post.link(connection, id_)
        session = Session(id_, key.tenant, key, connection, self._monotonic(), link, hello.relays)
        now = self._now()
        if earlier := self._sessions.open(session):
            self._left(earlier)
            self._writer.write(lambda store: store.session_ended(earlier.id, now))
        self._writer.write(lambda store: store.session_started(id_, key.tenant, hello.client[:200], now))
        self._writer.write(lambda store: store.key_used(key.id, now))
        return session

    def _refuse(self, connection: bytes, error: LorryError) -> None:
        self._post.bare(connection, Failed(None, error.info))


def _unknown(hello: Hello) -> AuthenticationError:
    shown = f"{hello.api_key[:8]}…" if hello.api_key else "empty"
    return AuthenticationError(f"api_key is {shown}, which is no key of this server", field="api_key")
