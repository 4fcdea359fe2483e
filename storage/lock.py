"""One broker a data folder: two would each believe that they alone decide order."""

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..wire.errors import InvalidRequestError
from .data_folder import make_private

FILE = "broker.lock"


@contextmanager
def sole_writer(folder: Path) -> Generator[None]:
    """Hold the folder for as long as the block lasts; the system lets go of it should the process die.

    Raises InvalidRequestError where another process holds it.
    """
    make_private(folder)
    with (folder / FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequestError.of("data", str(folder), "a folder that no other broker serves from") from None
        yield
