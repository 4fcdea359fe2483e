"""Looking at a deployment's data, which changes nothing of it: for who examines, copies or reports."""

from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

from ..wire.errors import InvalidRequestError, NotFoundError
from .connection import FILE
from .opening import is_at_rest
from .store import Store


@contextmanager
def looking(data: Path) -> Generator[Store]:
    """A store that reads, whether a service runs or not.

    Raises NotFoundError where there is no database, OlderReleaseError or NewerReleaseError for one of another release's
    schema, JournalDamagedError for one that is damaged, StorageUnavailableError where the disk refuses, and
    InvalidRequestError where a service came to change what was at rest.
    """
    file = data / FILE
    if not file.exists():
        raise NotFoundError(f"data is {str(data)!r}, where no Lorry has served yet", field="data")
    before = _state(file) if is_at_rest(file) else None
    try:
        with closing(Store(data, read_only=True)) as store:
            yield store
    finally:
        # It was read without locks: whatever came of that counts for nothing now, an error neither.
        if before is not None and _state(file) != before:
            raise InvalidRequestError.of("data", str(data), "a folder where no service starts or stops meanwhile")


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size
