"""The data folder and its database: made where they are not, and readable by their owner alone, for what tokens are
signed with lies there. Whatever the umask says: a program that embeds the service has one of its own."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from ..wire.errors import InvalidRequestError, StorageUnavailableError


def make_private(folder: Path) -> None:
    """Also one that an older release made for everybody to read; but for one that is another user's, or for all to
    share.

    Raises InvalidRequestError where there is something else, StorageUnavailableError where the disk refuses.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        is_shared = found.st_mode & stat.S_ISVTX  # a folder like /tmp, which others need
        if found.st_uid == os.geteuid() and found.st_mode & 0o077 and not is_shared:
            folder.chmod(0o700)
    except (FileExistsError, NotADirectoryError):
        raise InvalidRequestError.of("data", str(folder), "a folder, or a place for a new one") from None
    except OSError as error:
        raise refused(folder, error) from error


def make_private_file(file: Path) -> None:
    """An empty one where there is none. Raises StorageUnavailableError where the disk refuses."""
    try:
        # One that is there is not opened: closing it would drop the locks that this process holds on it.
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise refused(file, error) from error


def refused(place: Path, error: OSError) -> StorageUnavailableError:
    return StorageUnavailableError(f"{place} cannot be used at the moment: {error.strerror}")
