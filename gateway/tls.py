"""HTTP's certificate, which its files may change at any time: whoever connects next gets the new one, and connections
that there are go on. It watches nothing: each handshake looks at the files' dates."""

import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import structlog

from ..wire.errors import InvalidRequestError
from .config import HttpSettings

log = structlog.get_logger("lorry.gateway")

_State: TypeAlias = tuple[tuple[int, int, int] | None, ...]


class Certificate:
    """`context` is to listen with. A new pair of files that does not fit, or is half written, leaves the old one."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Raises InvalidRequestError."""
        self._cert, self._key = cert, key
        self._seen = self._state()
        try:
            self.context = self._current = self._read()
        except (OSError, ssl.SSLError) as error:
            raise self._wrong(error) from None
        # OpenSSL calls it in every handshake, for clients that name no server, too.
        self.context.sni_callback = self._at_handshake

    def _at_handshake(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
        state = self._state()
        if state != self._seen:
            self._seen = state
            try:
                self._current = self._read()
            except (OSError, ssl.SSLError) as error:
                log.warning("the certificate stays what it was: the new one is no use", error=str(self._wrong(error)))
            else:
                log.info("the certificate was read again", file=str(self._cert))
        # What belongs to a handshake under way is not changed by loading a chain: it gets another context.
        connection.context = self._current

    def _state(self) -> _State:
        return tuple(_state_of(file) for file in (self._cert, self._key))

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._cert, self._key, password="")  # or it would ask the terminal for one
        return context

    def _wrong(self, error: Exception) -> InvalidRequestError:
        """Which of the two it is."""
        for option, file in (("tls_cert", self._cert), ("tls_key", self._key)):
            try:
                content = file.read_text()
            except (OSError, UnicodeDecodeError) as unreadable:
                return InvalidRequestError.of(option, str(file), f"a PEM file that can be read ({unreadable})")
            if option == "tls_cert" and not _holds_certificates(content):
                return InvalidRequestError.of(option, str(file), "a PEM file with a certificate")
        expected = f"a PEM file with the key of the certificate in {self._cert}, not encrypted ({error})"
        return InvalidRequestError.of("tls_key", str(self._key), expected)


def certificate_of(settings: HttpSettings) -> Certificate | None:
    """None where there is to be none. Raises InvalidRequestError."""
    if settings.tls_cert is None and settings.tls_key is None:
        return None
    if settings.tls_cert is None:
        raise InvalidRequestError.of("tls_cert", None, "a PEM file, beside --tls-key")
    if settings.tls_key is None:
        raise InvalidRequestError.of("tls_key", None, "a PEM file, beside --tls-cert")
    return Certificate(Path(settings.tls_cert), Path(settings.tls_key))


def listening_with(certificate: Certificate) -> Callable[[object, object], ssl.SSLContext]:
    """As uvicorn asks for it."""
    return lambda _config, _default: certificate.context


def _state_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _holds_certificates(content: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content)
    except (ssl.SSLError, ValueError):
        return False
    return True
