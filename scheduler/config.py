"""The broker's settings: every field has a default that works on a laptop, and its unit in its name."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..wire.codec import MAX_PAYLOAD_BYTES
from ..wire.sockets import CurveKeys
from .planning.prices import Prices


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """`models` are the public names that actors will serve; `actor_token` is what an actor must show to join,
    `operator_key` what who sends an actor away must.

    A result is kept for `result_ttl_s`; one that was read, for `read_result_ttl_s`. Payloads that wait for their turn
    are held in memory up to `waiting_bytes`, the others are read again from the journal.

    A command that would take one actor longer than `spread_after_s` is divided among several; infinity divides none.

    Of models on one device, one of weight 2 in `model_weights` gets twice the time of one of weight 1 while both have
    work; without any, each takes what it can.

    A tenant has `sessions_per_tenant` connections open at the same time, a gateway's one for each key among them.

    Who follows what goes on is sent news `news_s` seconds apart.

    `curve` encrypts the clients' socket, `actor_curve` the actors'.
    """

    data: Path
    models: tuple[str, ...]
    actor_token: str = field(repr=False)
    bind: str = "tcp://127.0.0.1:5570"
    actor_bind: str = "tcp://127.0.0.1:*"
    curve: CurveKeys | None = None
    actor_curve: CurveKeys | None = None
    heartbeat_s: float = 5.0
    result_ttl_s: float = 7 * 24 * 3600.0
    read_result_ttl_s: float = 3600.0
    max_payload_bytes: int = MAX_PAYLOAD_BYTES
    max_waiting: int = 10_000
    waiting_bytes: int = 256 * 1024 * 1024
    prices: Prices = field(default_factory=Prices)
    operator_key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    spread_after_s: float = 10.0
    model_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    sessions_per_tenant: int = 500
    news_s: float = 1.0

    @property
    def checkpoints(self) -> Path:
        return self.data / "checkpoints"
