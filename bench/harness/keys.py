"""API keys of tenants: in a file of their own, for a workload is handed around. Pure but for its reading."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from lorry.wire.errors import AuthenticationError, InvalidRequestError

EVERYBODYS = ""


def read_keys(path: Path | None, environment: str | None) -> dict[str, str]:
    """A TOML file of TENANT = "KEY"; without one, `environment` has everybody's. Raises InvalidRequestError."""
    if path is None:
        return {} if environment is None else {EVERYBODYS: environment}
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), dict[str, str])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidRequestError(f"keys: {error}", field="keys") from None


def key_of(keys: Mapping[str, str], tenant: str) -> str:
    """Raises AuthenticationError."""
    key = keys.get(tenant, keys.get(EVERYBODYS))
    if key is None:
        raise AuthenticationError(f"no key is given for the tenant {tenant!r}", field="keys")
    return key
