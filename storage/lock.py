"""One broker a data folder: two would each believe that they alone decide order."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..wire.errors import InvalidRequestError
from .data_folder import make_private, refused

FILE = "broker.lock"


@contextmanager
def sole_writer(folder: Path) -> Generator[None]:
    """Hold the folder for as long as the block lasts; the system lets go of it should the process die.

    Raises InvalidRequestError where another process holds it, StorageUnavailableError where the disk refuses.
    """
    make_private(folder)
    try:
        descriptor = os.open(folder / FILE, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise refused(folder / FILE, error) from error
    with os.fdopen(descriptor) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequestError.of("data", str(folder), "a folder that no other broker serves from") from None
        yield
