"""What is done to a service, and when: a seed makes a schedule. Pure, but for its chance."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Deed = Literal["kill", "stop", "stop for a while", "terminate", "cut", "swallow", "fill for a while"]
Role = Literal["broker", "actor", "gateway", "supervisor", "network", "disk"]

_WEIGHTS: dict[tuple[Deed, Role], int] = {
    ("kill", "broker"): 4,
    ("kill", "actor"): 4,
    ("kill", "gateway"): 3,
    ("kill", "supervisor"): 1,
    ("terminate", "broker"): 2,
    ("terminate", "actor"): 2,
    ("terminate", "gateway"): 1,
    ("terminate", "supervisor"): 1,
    ("stop", "broker"): 1,
    ("stop", "actor"): 1,
    ("stop", "gateway"): 1,
    ("stop for a while", "broker"): 2,
    ("stop for a while", "actor"): 2,
    ("stop for a while", "gateway"): 1,
    ("stop for a while", "supervisor"): 1,
    ("fill for a while", "disk"): 3,
    ("cut", "network"): 4,
    ("swallow", "network"): 2,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """After `pause_s` seconds of peace; `lasts_s` is how long what is for a while lasts."""

    pause_s: float
    deed: Deed
    role: Role
    lasts_s: float


def schedule(seed: int, pause_s: tuple[float, float], spared: frozenset[Role] = frozenset()) -> Iterator[Fault]:
    """Without end. An actor is hurt every other time at the most: a command that three of them died of would fail, as
    it should."""
    chance = random.Random(seed)
    before: Role | None = None
    while True:
        last = {before} & {"actor", "supervisor"}
        possible = [fault for fault in _WEIGHTS if fault[1] not in last | spared]
        (deed, role), *_ = chance.choices(possible, [_WEIGHTS[fault] for fault in possible])
        yield Fault(chance.uniform(*pause_s), deed, role, chance.uniform(0.2, 5.0))
        before = role
