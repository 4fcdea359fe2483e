"""What a run's results must have been: its commands, one after another, on a state that is kept by hand.

It knows nothing of Lorry. A load may have found one of several states: all are followed until a result tells which.
"""

from dataclasses import dataclass, field
from typing import Any

from .history import Finding
from .numbers import mixed

Facts = dict[str, Any]

NAMES_AT_FAULT = {"../no"}


@dataclass(frozen=True, slots=True)
class Guess:
    """One of the states that a run may be in: weights, and the gradients that wait for a step."""

    weights: str
    pending: tuple[str, ...] = ()


@dataclass(slots=True)
class Saved:
    """By name: which saves have been done, at which seq, and the weights that each of the guesses wrote."""

    by_name: dict[str, dict[int, set[str]]] = field(default_factory=dict[str, dict[int, set[str]]])
    sampler: dict[str, dict[int, set[str]]] = field(default_factory=dict[str, dict[int, set[str]]])


class Reference:
    """`outcome` of a command is its error's code, or None, and its result."""

    def __init__(self, lane: str, seed: int) -> None:
        self.lane, self._guesses = lane, {Guess(mixed("seed", seed))}
        self.saved = Saved()

    def apply(self, command: Facts, code: str | None, result: str, least: int) -> Finding | None:
        """`least` is the seq of the newest save that a load must find, if it is a load. None where all is well."""
        kind, (uid, _, flaw) = command["kind"], _parts(command["payload"])
        if code is not None:
            if code == "NonFiniteError" and kind == "optim_step":
                self._guesses = {Guess(guess.weights) for guess in self._guesses}
            return None
        if kind == "load_state":
            return self._load(command, least)
        if kind in ("save_state", "save_weights_for_sampler"):
            book = self.saved.by_name if kind == "save_state" else self.saved.sampler
            book.setdefault(command["name"] or f"_{command['seq']}", {})[command["seq"]] = {
                guess.weights for guess in self._guesses
            }
            return None
        if flaw:
            return Finding("result", f"{self._named(command)} is {flaw}, and succeeded")
        possible = {guess: _computed(guess, kind, uid) for guess in self._guesses}
        right = {after for after, expected in possible.values() if expected == result}
        if not right:
            wanted = sorted(expected for _, expected in possible.values())
            return Finding("result", f"{self._named(command)} gave {result}, expected {' or '.join(wanted)}")
        self._guesses = right
        return None

    def _load(self, command: Facts, least: int) -> Finding | None:
        saves = self.saved.by_name.get(command["path"].rpartition("/")[2], {})
        found = {weights for seq, some in saves.items() if seq >= least for weights in some}
        if not found:
            return Finding("result", f"{self._named(command)} loaded what was never saved")
        self._guesses = {Guess(weights) for weights in found}
        return None

    def _named(self, command: Facts) -> str:
        return f"{command['kind']} {self.lane}:{command['seq']}"


def _computed(guess: Guess, kind: str, uid: str) -> tuple[Guess, str]:
    if kind == "forward":
        return guess, mixed("forward", guess.weights, uid)
    if kind == "optim_step":
        weights = mixed("step", guess.weights, sorted(guess.pending), uid)
        return Guess(weights), weights
    gradient = mixed("gradient", guess.weights, uid)
    return Guess(guess.weights, (*guess.pending, gradient)), gradient


def _parts(payload: bytes) -> tuple[str, int, str]:
    """uid, tokens, flaw."""
    if not payload:
        return "", 0, ""
    uid, tokens, flaw = payload.decode().split("|")
    return uid, int(tokens), flaw
