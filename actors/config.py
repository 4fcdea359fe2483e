"""An actor's settings. Every field has a default that works on a laptop, and its unit in its name."""

from dataclasses import dataclass, field

from ..wire.ids import ActorId


@dataclass(frozen=True, slots=True)
class ActorConfig:
    """`model` is a local folder or a hub id, served under the public name `base_model`.

    `server_key` is the broker's public CURVE key, where its actors' address is beyond loopback. `sample_share` is the
    least part of the device's time that decoding gets while training waits too. `sample_rows` sequences decode
    together, and a step computes at most `prefill_chunk` tokens of prompts beside them. `compile` has steps compiled
    when the actor starts, which takes up to a minute. `kv_cache_bytes` is what keys and values may take; None is a
    tenth of the host's memory, or on an accelerator two fifths of what the model leaves free. `kept_samplers` are
    sampler weights held in memory after use; more are loaded again from their folders.
    """

    actor: ActorId
    base_model: str
    model: str
    connect: str
    token: str = field(repr=False)
    server_key: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    slots: int = 16
    token_budget: int = 8192
    sample_rows: int = 64
    prefill_chunk: int = 512
    kv_cache_bytes: int | None = None
    max_rank: int = 256
    sample_share: float = 0.5
    compile: bool = False
    kept_samplers: int = 32
    threads: int | None = None
