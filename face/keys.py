"""The secrets of a deployment: three are files of its data folder, one is handed to actors in their environment."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from lorry.storage.data_folder import make_private, refused
from lorry.wire.errors import InvalidRequestError
from lorry.wire.sockets import CurveKeys


def link_key(data: Path) -> bytes:
    """What signs the links to downloads, made once and kept in the data folder, so that gateways agree on it."""
    return _made_once(data / "links.key", lambda: secrets.token_bytes(32))


def operator_key(data: Path) -> str:
    """What shows that somebody may read the data folder, made once and kept there."""
    return _made_once(data / "operator.key", lambda: secrets.token_hex(32).encode()).decode()


def curve_keys(data: Path) -> CurveKeys:
    """The server's key pair, made once and kept in the data folder, so that clients can rely on it."""

    def make() -> bytes:
        pair = CurveKeys.generate()
        return pair.public + b"\n" + pair.secret + b"\n"

    return CurveKeys(*_made_once(data / "curve.key", make).split())


def _made_once(file: Path, make: Callable[[], bytes]) -> bytes:
    """The same for all processes, however many come first at once: a file has its name only when it is whole. Raises
    StorageUnavailableError where the disk refuses."""
    try:
        if not file.exists():
            make_private(file.parent)
            with NamedTemporaryFile(dir=file.parent) as new:  # readable by its owner alone
                new.write(make())
                new.flush()
                with suppress(FileExistsError):
                    os.link(new.name, file)
        return file.read_bytes()
    except OSError as error:
        raise refused(file, error) from error


def actor_token() -> str:
    if token := os.environ.get("LORRY_ACTOR_TOKEN"):
        return token
    raise InvalidRequestError.of("LORRY_ACTOR_TOKEN", "", "a secret that the broker and its actors share")
