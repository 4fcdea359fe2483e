"""Who may come in: changed through the broker that serves a data folder, or in the folder where none does."""

import sqlite3
import time
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from anyio import to_thread

from lorry.client.operator import administer as ask_broker
from lorry.keys import operator_key
from lorry.scheduler.access.administration import carry_out, checked, done
from lorry.service import Service
from lorry.storage.audit import OPERATOR
from lorry.storage.connection import unusable
from lorry.storage.lock import served_at
from lorry.storage.looking import looking
from lorry.storage.store import Store
from lorry.wire.admin_messages import (
    AccessOrder,
    AdminOrder,
    CreateTenant,
    EndKey,
    ListKeys,
    ListLimits,
    ListTenants,
    RemoveTenant,
    SetLimits,
    SetTenant,
    new_key_id,
)
from lorry.wire.codec import decode
from lorry.wire.ids import TenantId
from lorry.wire.limits import SCOPES, USER_SCOPES, Scope
from lorry.wire.types import AuditEvent

T = TypeVar("T")

ADMIN = TenantId("admin")
"""Whose the first key is."""
_CONCERNS_BROKER = EndKey | RemoveTenant | CreateTenant | SetTenant | SetLimits


async def administer(service: Service, order: AccessOrder, kind: type[T]) -> T:
    """The answer, of this kind. What a broker need not hear of is done in the folder. The rest may be done twice: one
    that comes to serve the folder in this very moment is told, too.

    Raises InvalidRequestError, NotFoundError, StorageUnavailableError, and ConnectionLostError where a broker serves
    the folder and does not answer at the service's address.
    """
    if not isinstance(order, _CONCERNS_BROKER):
        return msgspec.convert(await to_thread.run_sync(_in_the_folder, service.data, order), kind)
    answer: object = None
    if not (is_served := is_served_now(service)):
        answer = await to_thread.run_sync(_in_the_folder, service.data, order)
    if is_served or is_served_now(service):
        await ask_broker(service.address, service.server_key, operator_key(service.data), order)
    return msgspec.convert(answer, kind)


async def ask(service: Service, order: AdminOrder, kind: type[T]) -> T:
    """What the broker answers. Raises as `administer` does."""
    return decode(await ask_broker(service.address, service.server_key, operator_key(service.data), order), kind)


def is_served_now(service: Service) -> bool:
    return service.was_named or served_at(service.data) is not None


def _in_the_folder(data: Path, order: AccessOrder) -> object:
    if isinstance(order, ListKeys | ListTenants | ListLimits):
        with looking(data) as store:
            return done(carry_out(store, order, time.time(), OPERATOR)).answer
    now = time.time()
    with changing(data) as store:
        return done(carry_out(store, checked(order, now), now, OPERATOR)).answer


@contextmanager
def changing(data: Path) -> Generator[Store]:
    """In one transaction. Raises StorageUnavailableError where the disk refuses, JournalDamagedError."""
    with closing(Store(data)) as store:
        try:
            with store.transaction():
                yield store
        except sqlite3.DatabaseError as error:
            raise unusable(data, error) from error


def first_admin_key(data: Path) -> str | None:
    """A key that may do everything, if no administrator ever had one."""
    with changing(data) as store:
        if any("admin" in key.scopes for key in store.api_keys()):
            return None
        return _first_key(store, ADMIN, SCOPES)


def first_key_of(data: Path, tenant: TenantId) -> str | None:
    """A key that may train and sample, if this tenant, who is made if new, never had one."""
    with changing(data) as store:
        return None if store.api_keys(tenant) else _first_key(store, tenant, USER_SCOPES)


def _first_key(store: Store, tenant: TenantId, scopes: Sequence[Scope]) -> str:
    now = time.time()
    store.tenant_made(tenant, now)
    key = new_key_id()
    store.audited(AuditEvent(now, tenant, OPERATOR, "key_created", key, {"scopes": ", ".join(scopes)}))
    return store.key_made(key, tenant, now, "the first", scopes)
