"""Who is connected: one session for each connection that said hello with a valid key. Pure; time is passed in."""

from collections import Counter
from dataclasses import dataclass, field

from ...storage.rows import KeyRow
from ...wire.ids import FutureId, KeyHash, SessionId, TenantId
from ...wire.sequenced import Link


@dataclass(slots=True)
class Session:
    """`key` is the API key, or the key behind the token, that opened it; `last_seen` is on the caller's monotonic
    clock, in seconds. Who `relays` says himself which results were read. `unsent` are futures whose results wait in the
    journal until the client has read what is under way to it; it `catches_up` while one of them is read. `behind` are
    futures of which it was not told all that was made."""

    id: SessionId
    tenant: TenantId
    key: KeyRow
    connection: bytes
    last_seen: float
    link: Link
    relays: bool = False
    unsent: dict[FutureId, None] = field(default_factory=dict[FutureId, None])
    behind: set[FutureId] = field(default_factory=set[FutureId])
    catches_up: bool = False

    def is_next(self, future: FutureId) -> bool:
        """Whether its result may be sent now: what had to wait goes first."""
        if not self.link.has_room or (self.unsent and next(iter(self.unsent)) != future):
            return False
        self.unsent.pop(future, None)
        return True


class Sessions:
    def __init__(self) -> None:
        self._by_connection: dict[bytes, Session] = {}
        self._open = Counter[TenantId]()
        self._revoked: set[KeyHash] = set()

    def open(self, session: Session) -> Session | None:
        """Returns the session that this connection had before, if any."""
        earlier = self.close(session.connection)
        self._by_connection[session.connection] = session
        self._open[session.tenant] += 1
        return earlier

    def at(self, connection: bytes) -> Session | None:
        return self._by_connection.get(connection)

    def heard(self, connection: bytes, now: float) -> Session | None:
        """The session behind a message, which proves that it lives."""
        if session := self._by_connection.get(connection):
            session.last_seen = now
        return session

    def close(self, connection: bytes) -> Session | None:
        session = self._by_connection.pop(connection, None)
        if session and self._open[session.tenant] > 1:
            self._open[session.tenant] -= 1
        elif session:
            del self._open[session.tenant]
        return session

    def open_of(self, tenant: TenantId) -> int:
        """How many."""
        return self._open[tenant]

    def revoke(self, key: KeyHash) -> list[Session]:
        """The key opens no session any more; returns those that it has opened."""
        self._revoked.add(key)
        return [session for session in self._by_connection.values() if session.key.hash == key]

    def all(self) -> list[Session]:
        return list(self._by_connection.values())

    def is_revoked(self, key: KeyHash) -> bool:
        """Also for a hello that was looked up before its key was deleted."""
        return key in self._revoked

    def heard_all(self, now: float) -> None:
        """Nobody was listened to until now."""
        for session in self._by_connection.values():
            session.last_seen = now

    def silent_since(self, moment: float) -> list[Session]:
        return [session for session in self._by_connection.values() if session.last_seen < moment]

    def __len__(self) -> int:
        return len(self._by_connection)
