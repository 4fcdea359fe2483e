"""The gateway's settings: every field has a default that works on a laptop, and its unit in its name."""

from dataclasses import dataclass, field
from pathlib import Path

from ..wire.codec import MAX_PAYLOAD_BYTES


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
