"""Addresses as an operator writes them. Pure: nothing is looked up."""

from ipaddress import ip_address

from lorry.gateway.config import HttpSettings
from lorry.gateway.peers import trusted
from lorry.wire.errors import InvalidRequestError


def host_and_port(http: str) -> tuple[str, int]:
    host, _, port = http.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequestError.of("http", http, "HOST:PORT")
    return host.strip("[]"), int(port)


def is_loopback(bind: str) -> bool:
    """Whether ipc://PATH or tcp://HOST:PORT is reached from this machine alone; InvalidRequestError otherwise."""
    if bind.startswith("ipc://"):
        return True
    host = bind.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if not bind.startswith("tcp://") or not host:
        raise InvalidRequestError.of("bind", bind, "tcp://HOST:PORT")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(http: str, settings: HttpSettings) -> None:
    """Keys and data leave this machine in the clear only where somebody has said so. Raises InvalidRequestError."""
    said = trusted(settings) or settings.tls_cert or settings.tls_key or settings.plain_http
    if not said and host_and_port(http) and not is_loopback(f"tcp://{http}"):
        ways = "--tls-cert and --tls-key encrypt, --trusted-proxies names a proxy that does, --plain-http does without"
        expected = f"an address on loopback, or a word on who reads along beyond it: {ways}"
        raise InvalidRequestError.of("http", http, expected)


def reached_from_here(bind: str) -> str:
    """Where a client on this machine connects to what listens at `bind`, which may be all of its addresses."""
    return bind.replace("tcp://0.0.0.0:", "tcp://127.0.0.1:").replace("tcp://[::]:", "tcp://[::1]:")
