"""What those order who run the deployment: an operator with the key that lies in the data folder, who has no session,
and an administrator over a session whose key has that scope."""

import secrets
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

from ..storage.audit import OPERATOR
from ..storage.reader import Reader
from ..storage.reports import endings
from ..storage.rows import KeyRow
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.admin_messages import (
    Administer,
    AdminOrder,
    CreateKey,
    CreateTenant,
    Ending,
    EndKey,
    FindHomes,
    LimitCheckpoints,
    ListJobs,
    LookAtEndings,
    LookAtStorage,
    LookOver,
    RemoveCheckpoints,
    RemoveTenant,
    SetLimits,
    SetTenant,
    ShareCheckpoints,
    StartDrain,
)
from ..wire.client_messages import Drain, Failed, ImportAdapter
from ..wire.errors import InvalidRequestError, LorryError, StorageUnavailableError
from ..wire.ids import ActorId, TenantId
from ..wire.news import Change
from ..wire.types import AuditEvent
from .access.administration import Carried
from .access.keyring import Keyring
from .access.sessions import Session
from .catalogue import Catalogue
from .client_post import ClientPost
from .observing.newsroom import DEPLOYMENT, Newsroom
from .planning.limits import Meters
from .storing import storage

_NOBODYS = TenantId("")
"""What is no tenant's: administrators alone read it."""
_CHANGES: dict[type, tuple[Change, ...]] = {
    CreateKey: ("keys", "tenants"),
    EndKey: ("keys",),
    CreateTenant: ("tenants",),
    SetTenant: ("tenants",),
    RemoveTenant: ("tenants", "keys"),
    SetLimits: ("tenants",),
}
"""What is worth asking for again after an order."""


class Orders:
    """`drain` returns when an actor has left, and `start_drain` when it was told to. `turn_out` ends what was opened,
    and asked for, with keys that open nothing any more."""

    def __init__(
        self,
        operator_key: str,
        data: Path,
        meters: Meters,
        post: ClientPost,
        keyring: Keyring,
        catalogue: Catalogue,
        writer: Writer,
        reader: Reader,
        now: Callable[[], float],
        drain: Callable[[ActorId], Awaitable[None]],
        start_drain: Callable[[ActorId], None],
        turn_out: Callable[[Iterable[KeyRow]], None],
        newsroom: Newsroom,
    ) -> None:
        self._data, self._meters = data, meters
        self._operator_key, self._post, self._keyring, self._catalogue = operator_key, post, keyring, catalogue
        self._writer, self._reader, self._now = writer, reader, now
        self._drain, self._start_drain, self._turn_out = drain, start_drain, turn_out
        self._newsroom = newsroom

    async def administer(self, session: Session, message: Administer) -> None:
        try:
            carried = await self._carry_out(message.order, session.key.id)
        except LorryError as error:
            self._post.send(session.connection, Failed(message.request, error.info))
        else:
            self._post.answer(session.connection, message.request, carried.answer)
            self._turn_out(carried.ended)

    async def obey(self, connection: bytes, order: Drain | ImportAdapter | Administer) -> None:
        answer: object = None
        try:
            if not secrets.compare_digest(order.operator_key.encode(), self._operator_key.encode()):
                raise InvalidRequestError.of("operator_key", "another", "what operator.key in the data folder holds")
            if isinstance(order, Drain):
                await self._drain(order.actor)
            elif isinstance(order, Administer):
                carried = await self._carry_out(order.order, OPERATOR)
                self._turn_out(carried.ended)
                answer = carried.answer
            elif self._writer.trouble is not None:
                raise StorageUnavailableError(self._writer.trouble)
            else:
                answer = await self._catalogue.shelf.import_adapter(order)
        except LorryError as error:
            self._post.bare(connection, Failed(order.request, error.info))
        else:
            self._post.answer(connection, order.request, answer)

    async def _carry_out(self, order: AdminOrder, by: str) -> Carried:
        match order:
            case ListJobs():
                return Carried(await self._catalogue.overview.jobs(order.wanted))
            case LookOver():
                return Carried(await self._catalogue.overview.look())
            case FindHomes():
                return Carried(self._catalogue.overview.homes(order.runs))
            case LookAtEndings():
                rows = await self._reader.read(endings)
                return Carried([Ending(**row) for row in rows])
            case LookAtStorage():
                now = self._now()
                look = partial(storage, meters=self._meters, data=self._data, now=now)
                return Carried(await self._reader.read_at_leisure(look))
            case StartDrain():
                return await self._begin_drain(order.actor, by)
            case RemoveCheckpoints() | ShareCheckpoints() | LimitCheckpoints():
                return Carried(await self._catalogue.shelf.checkpoints.carry_out(order, by))
            case _:
                carried = await self._keyring.carry_out(order, by)
                for change in _CHANGES.get(type(order), ()):
                    self._newsroom.changed(DEPLOYMENT, change)
                return carried

    async def _begin_drain(self, actor: ActorId, by: str) -> Carried:
        """Raises NotFoundError, StorageUnavailableError."""
        if self._writer.trouble is not None:
            raise StorageUnavailableError(self._writer.trouble)
        self._start_drain(actor)
        event = AuditEvent(self._now(), _NOBODYS, by, "actor_drained", actor)

        def record(store: Store) -> None:
            store.audited(event)

        await self._writer.write_and_wait(record)
        return Carried()
