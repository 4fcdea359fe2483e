"""The secrets of a deployment: two are files of its data folder, one is handed to actors in their environment."""

import os
import secrets
from pathlib import Path

from lorry.wire.errors import InvalidRequestError
from lorry.wire.sockets import CurveKeys


def link_key(data: Path) -> bytes:
    """What signs the links to downloads, made once and kept in the data folder, so that gateways agree on it."""
    file = data / "links.key"
    if not file.exists():
        data.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_bytes(secrets.token_bytes(32))
    return file.read_bytes()


def curve_keys(data: Path) -> CurveKeys:
    """The server's key pair, made once and kept in the data folder, so that clients can rely on it."""
    file = data / "curve.key"
    if file.exists():
        return CurveKeys(*file.read_bytes().split())
    pair = CurveKeys.generate()
    data.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    file.write_bytes(pair.public + b"\n" + pair.secret + b"\n")
    return pair


def actor_token() -> str:
    if token := os.environ.get("LORRY_ACTOR_TOKEN"):
        return token
    raise InvalidRequestError.of("LORRY_ACTOR_TOKEN", "", "a secret that the broker and its actors share")
