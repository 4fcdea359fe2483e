"""Files that the database names stay while somebody copies or examines them, whatever the service does meanwhile."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

FILE = "hold.lock"


@contextmanager
def held(data: Path) -> Generator[None]:
    """Nothing below `data` is deleted for as long as the block lasts, or the process lives. One at a time: a second
    waits. It makes no file: where there is none, as in a backup, nobody deletes."""
    if not (data / FILE).exists():
        yield
        return
    with (data / FILE).open("r+" if os.access(data / FILE, os.W_OK) else "r") as file:  # NFS locks what is writable
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def deleting(data: Path) -> Generator[bool]:
    """Whether files may be deleted now. Where they may not, the next sweep finds them."""
    with (data / FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
