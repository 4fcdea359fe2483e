"""What stands for numbers: hashes of all that a true result depends on. And how a command's payload is written."""

import hashlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

Flaw: TypeAlias = Literal["", "nan", "bad", "poison"]
"""nan: an optim_step drops the gradient; bad: the actor refuses it; poison: it kills the actor."""


@dataclass(frozen=True, slots=True)
class Payload:
    """`uid` is no other's; `tokens` is what an actor will count."""

    uid: str
    tokens: int
    flaw: Flaw = ""

    def packed(self) -> bytes:
        return f"{self.uid}|{self.tokens}|{self.flaw}".encode()

    @classmethod
    def unpacked(cls, content: bytes) -> "Payload":
        uid, tokens, flaw = content.decode().split("|")
        return cls(uid, int(tokens), flaw)  # type: ignore[arg-type]


def mixed(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def measured(result: str) -> float:
    """What an actor tells as a number of a result: sums of some are exact."""
    return float(int(mixed("measured", result)[:8], 16))
