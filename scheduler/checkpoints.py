"""What becomes of a checkpoint's name: who may read it, how long it lives, its end. Written down with who did it.

What a change makes of a row is pure, so that operators may have it done on a folder that no broker serves.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from ..storage.rows import CheckpointRow
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.admin_messages import CheckpointOrder, LimitCheckpoints, RemoveCheckpoints, ShareCheckpoints
from ..wire.errors import StorageUnavailableError
from ..wire.types import AuditEvent
from .registry import Registry, no_checkpoint


class Checkpoints:
    """`drop` deletes a folder that nothing needs."""

    def __init__(
        self, registry: Registry, writer: Writer, now: Callable[[], float], drop: Callable[[str], Awaitable[None]]
    ) -> None:
        self._registry, self._writer, self._now, self._drop = registry, writer, now, drop

    async def change(self, checkpoint: CheckpointRow, did: AuditEvent) -> None:
        """Raises NotFoundError where it went in this very moment."""
        self._registry.add_checkpoint(checkpoint)
        if await self._writer.write_and_wait(lambda store: recorded(store, [(checkpoint, checkpoint, did)])):
            raise no_checkpoint(checkpoint.path)

    async def remove(self, *gone: tuple[CheckpointRow, AuditEvent]) -> None:
        """Their names are gone at once, in one transaction; their folders too, or when nothing needs them any more."""
        changes: list[Change] = [(checkpoint, None, did) for checkpoint, did in gone]
        for checkpoint, _ in gone:
            self._registry.remove_checkpoint(checkpoint)
        await self._writer.write_and_wait(lambda store: recorded(store, changes))
        for checkpoint, _ in gone:
            await self._drop(checkpoint.folder)

    async def carry_out(self, order: CheckpointOrder, by: str) -> list[str]:
        """In one transaction: the paths of those that are not there. `by` is a key's id, or the operator. Raises
        StorageUnavailableError."""
        if self._writer.trouble is not None:
            raise StorageUnavailableError(self._writer.trouble)
        changes = changes_of(order, self._registry.named, self._now(), by)
        for before, after, _ in changes:
            if after is None:
                self._registry.remove_checkpoint(before)
            else:
                self._registry.add_checkpoint(after)
        gone = await self._writer.write_and_wait(lambda store: recorded(store, changes))
        for before, after, _ in changes:
            if after is None:
                await self._drop(before.folder)
        return [*not_there(order, changes), *gone]


Change = tuple[CheckpointRow, CheckpointRow | None, AuditEvent]
"""Before and after, None where it is gone; and who did it."""


def changes_of(
    order: CheckpointOrder, named: Callable[[str], CheckpointRow | None], now: float, by: str
) -> list[Change]:
    """`named` finds those that have a name, and are not over."""
    meant = {chosen.path: chosen.created_at for chosen in order.chosen}
    found = [(named(path), created_at) for path, created_at in meant.items()]
    rows = [row for row, created_at in found if row is not None and row.created_at == created_at]
    return [(row, _after(order, row, now), _did(order, row, now, by)) for row in rows]


def not_there(order: CheckpointOrder, changes: Iterable[Change]) -> list[str]:
    found = {before.path for before, *_ in changes}
    return [chosen.path for chosen in order.chosen if chosen.path not in found]


def recorded(store: Store, changes: Iterable[Change]) -> list[str]:
    """Inside a transaction: the paths of those that went in this very moment, of which nothing is written down."""
    gone: list[str] = []
    for before, after, did in changes:
        if after is None:
            store.checkpoint_deleted(before, did.at)
        elif not store.checkpoint_changed(after, did.at):
            gone.append(before.path)
            continue
        store.audited(did)
    return gone


def _after(order: CheckpointOrder, row: CheckpointRow, now: float) -> CheckpointRow | None:
    match order:
        case RemoveCheckpoints():
            return None
        case ShareCheckpoints():
            return replace(row, public=order.public)
        case LimitCheckpoints():
            return replace(row, expires_at=None if order.ttl_seconds is None else now + order.ttl_seconds)


def _did(order: CheckpointOrder, row: CheckpointRow, now: float, by: str) -> AuditEvent:
    match order:
        case RemoveCheckpoints():
            return AuditEvent(now, row.tenant, by, "checkpoint_deleted", row.path)
        case ShareCheckpoints():
            event = f"checkpoint_{'' if order.public else 'un'}published"
            return AuditEvent(now, row.tenant, by, event, row.path)
        case LimitCheckpoints():
            ttl = "never" if order.ttl_seconds is None else f"in {order.ttl_seconds} s"
            return AuditEvent(now, row.tenant, by, "checkpoint_expiry_set", row.path, {"expires": ttl})
