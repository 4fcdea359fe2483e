"""A deployment as a command line finds it."""

from dataclasses import dataclass
from pathlib import Path

from lorry.addresses import is_loopback, reached_from_here
from lorry.config import default_data
from lorry.keys import curve_keys
from lorry.options import LOCAL_BROKER
from lorry.storage.lock import served_at
from lorry.wire.errors import ConnectionLostError


@dataclass(frozen=True, slots=True)
class Service:
    """Where its broker listens, and where its data lies. One that `was_named` is meant, whoever serves the folder."""

    address: str
    server_key: str | None
    data: Path
    was_named: bool = False


def find_service(connect: str | None, server_key: str | None, data: Path | None) -> Service:
    """What was not said is found in the data folder, where a broker that serves it says where it does. Raises
    ConnectionLostError for one that does not yet."""
    folder = data or default_data()
    if connect is not None:
        return Service(connect, server_key, folder, was_named=True)
    if (address := served_at(folder)) == "":
        raise ConnectionLostError(f"the broker that serves {folder} is starting, and serves nobody yet")
    if address is None:
        return Service(LOCAL_BROKER, server_key, folder)
    own_key = None if is_loopback(address) else curve_keys(folder).public.decode()
    return Service(reached_from_here(address), server_key or own_key, folder)
