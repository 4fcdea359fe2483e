"""A run's training state, as an actor holds it and as it lies in a folder."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .numbers import Payload, mixed

FILE = "state.json"


class UnreadableError(Exception):
    """Nothing that can be loaded is in this folder."""


@dataclass(frozen=True, slots=True)
class State:
    """`pending` are the gradients that wait for a step; `seq` is the last command that was applied."""

    weights: str
    pending: tuple[str, ...] = ()
    seq: int = -1

    @classmethod
    def fresh(cls, seed: int) -> "State":
        return cls(mixed("seed", seed))

    def backward(self, payload: Payload) -> tuple["State", str]:
        gradient = mixed("gradient", self.weights, payload.uid)
        return replace(self, pending=(*self.pending, gradient)), gradient

    def stepped(self, payload: Payload) -> tuple["State", str]:
        weights = mixed("step", self.weights, sorted(self.pending), payload.uid)
        return replace(self, weights=weights, pending=()), weights

    def written(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "State":
        try:
            found = json.loads((folder / FILE).read_text())
            return cls(found["weights"], tuple(found["pending"]), found["seq"])
        except (OSError, ValueError) as error:
            raise UnreadableError(f"{folder.name}: {type(error).__name__}") from None
