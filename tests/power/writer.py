"""`python -m tests.power.writer FAULT`: journals commands until it is killed, and acknowledges each.

FAULT is a way to get that wrong, or "none".
"""

import os
import sys
from pathlib import Path

import anyio

from lorry.actors.adapters import folders
from lorry.storage import blobs
from lorry.storage.rows import RunRow
from lorry.storage.store import Store
from lorry.storage.writer import Writer
from lorry.wire.ids import RunId, TenantId
from lorry.wire.tasks import background_tasks
from lorry.wire.types import LoraConfig
from tests.storage.test_store import command


def plant(fault: str, store: Store) -> None:
    match fault:
        case "the journal is not synced":
            store.rows("PRAGMA synchronous = OFF")
        case "files are not synced":
            blobs.os = _WithoutSync()  # type: ignore[attr-defined]
        case "names of files are not synced":
            blobs.Blobs.settle = lambda self: None  # type: ignore[method-assign]
        case "folders are not synced":
            folders._fsync = lambda path: None  # pyright: ignore[reportPrivateUsage]
        case _:
            assert fault == "none", fault


class _WithoutSync:
    def __getattr__(self, name: str) -> object:
        return (lambda descriptor: None) if name == "fsync" else getattr(os, name)


def payload(seq: int) -> bytes:
    return seq.to_bytes(4, "big") * (50_000 if seq % 3 == 0 else 100)


def save(root: Path, seq: int) -> None:
    with folders.written_aside(root / "checkpoints" / "run-1" / "snapshots" / str(seq)) as aside:
        (aside / "weights").write_bytes(payload(seq))
        folders.seal(aside)


async def journal(store: Store, root: Path) -> None:
    writer = Writer(store)
    async with background_tasks() as tasks:
        tasks.start_soon(writer.run)
        for seq in range(10_000):
            await writer.write_and_wait(
                lambda store, seq=seq: store.command_accepted(command(seq), payload(seq), b"", 1.0)
            )
            if seq % 10 == 0:
                await anyio.to_thread.run_sync(save, root, seq)
            print(seq, flush=True)


def main() -> None:
    root = Path(os.environ["FORGETFUL_ROOT"])
    store = Store(root)
    store.create_key(TenantId("alice"), 1.0)
    store.run_created(RunRow(RunId("run-1"), TenantId("alice"), "nonce", "base", LoraConfig(rank=4), {}, 1.0, 1.0))
    plant(sys.argv[1], store)
    anyio.run(journal, store, root)


if __name__ == "__main__":
    main()
