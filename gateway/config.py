"""The gateway's settings: every field has a default that works on a laptop, and its unit in its name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from ..wire.codec import MAX_PAYLOAD_BYTES


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """What an operator may set of HTTP, and the only list of it: the command line's options are made of these."""

    tls_cert: Annotated[
        str | None, Meta(description="PEM file of HTTP's certificate and those between; read again when it changes")
    ] = None
    tls_key: Annotated[str | None, Meta(description="PEM file of the certificate's key, which is not encrypted")] = None
    trusted_proxies: Annotated[
        str | None,
        Meta(
            description="Addresses or networks, with commas in between, whose X-Forwarded-For and -Proto are believed"
        ),
    ] = None
    plain_http: Annotated[
        bool, Meta(description="Serve HTTP beyond loopback without encryption: who listens reads keys and data")
    ] = False
    requests_per_key: Annotated[
        int, Meta(ge=1, description="Requests of a key that are answered at the same time, those that wait included")
    ] = 1000
    http_connections: Annotated[int, Meta(ge=1, description="Connections that are open at the same time")] = 4000
    connections_per_address: Annotated[
        int, Meta(ge=1, description="Of these from one address, or IPv6 network of 64 bits, that is no trusted proxy")
    ] = 2000
    slow_after_s: Annotated[
        float,
        Meta(ge=0.05, description="Seconds for a request's head, and for each 16 KiB of its body, or it is cut off"),
    ] = 20.0


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """`connect` is the broker's address for clients, `server_key` its public CURVE key where it is not on loopback.

    Downloads are read from `checkpoints`, the broker's folder; without it there are none. `link_key` signs the links
    to them: gateways that share it accept each other's. `url` is the address that the links begin with, where clients
    do not reach the gateway under the name by which they call it.
    """

    connect: str
    host: str = "127.0.0.1"
    port: int = 8000
    server_key: str | None = None
    checkpoints: Path | None = None
    link_key: bytes = field(default=b"", repr=False)
    url: str | None = None
    long_poll_s: float = 30.0
    answer_within_s: float = 30.0
    idle_connection_s: float = 300.0
    link_ttl_s: float = 3600.0
    max_body_bytes: int = MAX_PAYLOAD_BYTES
    max_bytes_in_flight: int = 4 * MAX_PAYLOAD_BYTES
    http: HttpSettings = field(default_factory=HttpSettings)
