"""Folders that nothing needs any more: marked by the database, then deleted. Nothing else deletes checkpoints' data."""

from collections.abc import Callable
from pathlib import Path

import anyio
import structlog
from anyio import to_thread

from ..storage.checkpoints import delete_folder, folders_below, not_in_use, place_of
from ..storage.store import Store
from ..storage.writer import Writer
from .registry import Registry

log = structlog.get_logger("lorry.broker")

SAMPLER_IDLE_S = 24 * 3600.0
"""How long a sampler keeps weights that no name leads to any more, after it was used last."""


class Sweeper:
    """All questions go through the writer, so that they see what was accepted before. What is needed is named in the
    journal before anybody makes it, and nothing can come to need a folder that nothing needs."""

    def __init__(self, root: Path, registry: Registry, writer: Writer, now: Callable[[], float]) -> None:
        self._root, self._registry, self._writer, self._now = root, registry, writer, now
        self._offered: list[str] = []
        self._kept = set[str]()
        self._all = True  # a crash may have left something
        self._wanted = anyio.Event()
        self._wanted.set()

    def want(self) -> None:
        """It is time to look at everything."""
        self._all = True
        self._wanted.set()

    def offer(self, folder: str) -> None:
        """It may have become nobody's."""
        self._offered.append(folder)
        self._wanted.set()

    def keep(self, folder: str) -> None:
        """It stays until `let_go`, whatever the database says."""
        self._kept.add(folder)

    def let_go(self, folder: str) -> None:
        self._kept.discard(folder)
        self.offer(folder)

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted = anyio.Event()
            (offered, self._offered), (everything, self._all) = (self._offered, []), (self._all, False)
            if everything:
                await self.sweep()
            for folder in offered:
                await self.drop(folder)

    async def drop(self, folder: str) -> None:
        """Delete it unless something needs it."""
        is_in_use = await self._writer.write_and_wait(lambda store: store.folder_is_in_use(folder))
        if not is_in_use and folder not in self._kept:
            await self._delete(Path(folder))

    async def sweep(self) -> None:
        """All that nothing needs; first the samplers that nobody uses any more."""
        there = await to_thread.run_sync(folders_below, self._root)
        before = self._now() - SAMPLER_IDLE_S

        def mark(store: Store) -> tuple[list[str], set[str]]:
            return store.samplers_expired(before), store.folders_in_use()

        gone, needed = await self._writer.write_and_wait(mark)
        for sampler in gone:
            self._registry.remove_sampler(sampler)
        for folder in not_in_use(there, needed | self._kept):
            await self._delete(folder)

    async def _delete(self, folder: Path) -> None:
        """Below our own root, wherever the data lay when the row was written."""
        try:
            await to_thread.run_sync(delete_folder, self._root, self._root.joinpath(*place_of(folder)))
        except OSError as error:  # the next sweep tries again; the service goes on
            log.warning("a folder could not be deleted", folder=str(folder), error=str(error))
