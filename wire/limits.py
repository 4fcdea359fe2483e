"""What a key may do, and how much somebody may have: the words that administrators use."""

from typing import Annotated, Literal, TypeAlias

import msgspec

Scope: TypeAlias = Literal["train", "sample", "read", "admin", "metrics"]
"""What a key may do: train runs and change their checkpoints; sample; list, download and see usage; administer the
deployment; read what is measured of it, and nothing else. What any use of a run or a sampler takes, all but the last
may."""
SCOPES: tuple[Scope, ...] = ("train", "sample", "read", "admin", "metrics")
USER_SCOPES: tuple[Scope, ...] = ("train", "sample", "read")
"""What a key may where nothing else was said."""

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
"""What the database can hold and add up."""
Amount: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Positive: TypeAlias = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
TTL_AT_MOST_S = 100 * 366 * 86_400
"""A later end is none that a calendar could tell."""
Ttl: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=TTL_AT_MOST_S)]


class Limits(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What somebody may have at most; None is any number. Active `runs`, and the `rank` of each; tokens of requests
    that wait or run; requests a second; sequences that are sampled at the same time; bytes of checkpoints with names;
    USD in a calendar month of UTC; and the names of base `models`.

    Beside these, what becomes of checkpoints: for how many seconds one is kept, by kind, that is saved without a time
    to live; and of how many with names, of each kind, a run keeps the newest, but for those that are public."""

    runs: Amount | None = None
    rank: Amount | None = None
    queued_tokens: Amount | None = None
    requests_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    concurrent_samples: Amount | None = None
    stored_bytes: Amount | None = None
    monthly_usd: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None
    models: list[str] | None = None
    training_ttl_s: Ttl | None = None
    sampler_ttl_s: Ttl | None = None
    external_ttl_s: Ttl | None = None
    keep_last: Positive | None = None
