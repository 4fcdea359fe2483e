"""One broker a data folder: two would each believe that they alone decide order. It says there where it listens."""

import fcntl
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from ..wire.errors import InvalidRequestError
from .data_folder import make_private, refused

FILE = "broker.lock"
_PATIENCE_S = 1.0


@contextmanager
def sole_writer(folder: Path) -> Generator[Callable[[str], None]]:
    """Hold the folder for as long as the block lasts; the system lets go of it should the process die. Yields what is
    to be called with the address at which clients are served, and raises StorageUnavailableError, too.

    Raises InvalidRequestError where another process holds it, StorageUnavailableError where the disk refuses.
    """
    make_private(folder)
    with _opened(folder, os.O_CREAT | os.O_RDWR) as file:
        try:
            _lock(file)
        except BlockingIOError:
            raise InvalidRequestError.of("data", str(folder), "a folder that no other broker serves from") from None
        file.truncate(0)

        def announce(address: str) -> None:
            try:
                file.write(address.encode())
                file.flush()
            except OSError as error:
                raise refused(folder / FILE, error) from error

        yield announce


def served_at(folder: Path) -> str | None:
    """Where the broker that holds it serves clients; empty while it does not yet, None where there is none. Raises
    StorageUnavailableError where the disk refuses."""
    if not (folder / FILE).exists():
        return None
    with _opened(folder, os.O_RDONLY) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().decode()
        return None


def _opened(folder: Path, flags: int) -> IO[bytes]:
    try:
        descriptor = os.open(folder / FILE, flags, 0o600)
    except OSError as error:
        raise refused(folder / FILE, error) from error
    return os.fdopen(descriptor, "r+b" if flags & os.O_RDWR else "rb")


@retry(
    retry=retry_if_exception_type(BlockingIOError),
    stop=stop_after_delay(_PATIENCE_S),
    wait=wait_fixed(0.02),
    reraise=True,
)
def _lock(file: IO[bytes]) -> None:
    """Who asks whether a folder is served holds it for a moment."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
