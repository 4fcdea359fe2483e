"""What a follower is told while something goes on: pushed by the broker, never asked for."""

from typing import Literal, TypeAlias

import msgspec

from .metrics import RunPoint
from .overview import Overview

Followed: TypeAlias = Literal["own", "deployment"]
"""What the asking tenant has; or the whole deployment, which takes the scope `admin`."""
Change: TypeAlias = Literal["runs", "checkpoints", "samplers", "jobs", "tenants", "keys", "actors", "audit"]
"""Of what something was added, changed or removed. The last four are told of the deployment alone."""

POINTS_AT_MOST = 2000
BYTES_AT_MOST = 1 << 20
"""Of points in one piece of news."""


class Follow(msgspec.Struct, frozen=True, tag="follow"):
    """Until this connection ends it is sent `NewsCame` messages: one at once, and then, at most one a second, whenever
    there is something. Asked for again, one is sent at once again."""

    request: int
    of: Followed


class Unfollow(msgspec.Struct, frozen=True, tag="unfollow"):
    request: int
    of: Followed


class News(msgspec.Struct, frozen=True):
    """Since the last one, at `at` in Unix seconds.

    `points` are of the tenant's runs. What is named in `changed` is worth asking for again. `waiting` are the commands
    that are not over: the tenant's, or everybody's. `missed` says that the follower was not told all: it was slow, or
    away, or there was too much; whatever it shows is worth asking for again. `overview` is the deployment's, where it
    has changed; None for who follows what is his own."""

    at: float
    points: list[RunPoint]
    changed: list[Change]
    waiting: int
    missed: bool = False
    overview: Overview | None = None
