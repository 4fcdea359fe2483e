"""Results on their way to clients: told when they come, looked up when they came before, and held back from who does
not keep up."""

from collections.abc import Iterable
from functools import partial

from anyio.abc import TaskGroup

from ..storage.reader import Reader
from ..storage.rows import ResultRow
from ..storage.store import Store
from ..wire.client_messages import Resolved
from ..wire.errors import NotFoundError
from ..wire.ids import FutureId, LaneId
from .access.sessions import Session, Sessions
from .client_post import ClientPost
from .commands import Commands
from .registry import Registry


class ClientResults:
    def __init__(
        self,
        registry: Registry,
        commands: Commands,
        reader: Reader,
        post: ClientPost,
        sessions: Sessions,
        tasks: TaskGroup,
    ) -> None:
        self._registry, self._commands, self._reader = registry, commands, reader
        self._post, self._sessions, self._tasks = post, sessions, tasks

    def watch(self, session: Session, future: FutureId) -> None:
        """Tell it the result now, or when there is one."""
        if not self._is_own(session, future):
            self._send(session, future, None)
        elif self._commands.waiters.is_open(future):
            self._commands.waiters.watch(future, session.connection)
            if made := [(future, each) for each in self._commands.made_so_far(future)]:
                self._post.stream(session.connection, made, self._commands.made_so_far)
        else:
            self._tasks.start_soon(self._look_up, session, future)

    def read(self, session: Session, futures: Iterable[FutureId]) -> None:
        """It has passed them on to whom they were for."""
        self._commands.finishing.read(future for future in futures if self._is_own(session, future))

    def may_send(self, session: Session) -> None:
        """What had to wait goes on, should its client have read what is under way to it."""
        if session.unsent and session.link.has_room and not session.catches_up:
            session.catches_up = True
            self._tasks.start_soon(self._catch_up, session)

    async def _catch_up(self, session: Session) -> None:
        while session.unsent and session.link.has_room and self._sessions.at(session.connection) is session:
            future = next(iter(session.unsent))
            result = await self._reader.read(partial(_result, future))
            self._send(session, future, result)
            if result is None:  # expired meanwhile
                session.unsent.pop(future, None)
        session.catches_up = False

    async def _look_up(self, session: Session, future: FutureId) -> None:
        self._send(session, future, await self._reader.read(partial(_result, future)))

    def _send(self, session: Session, future: FutureId, result: ResultRow | None) -> None:
        if result is None:
            error = NotFoundError(f"there is no future {future!r}")
            self._post.send(session.connection, Resolved(future, error.info))
        else:
            self._commands.finishing.tell([session.connection], future, result.error, result.payload)

    def _is_own(self, session: Session, future: FutureId) -> bool:
        try:
            return bool(self._registry.lane(session.tenant, LaneId(future.rpartition(":")[0])))
        except NotFoundError:
            return False


def _result(future: FutureId, store: Store) -> ResultRow | None:
    return store.result(future)
