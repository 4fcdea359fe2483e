"""How the time of one device is shared by base models that lie on it. Pure: the time is passed in, in seconds.

As tenants share tokens (`fairness`), models share seconds: whoever was served least, relative to its weight, goes on,
and who is ahead of that by more than `QUANTUM_S` gets nothing new. Of models that have work on the device at the same
time, each is taken to have an equal part of it: so kernels of several processes share a GPU, and threads a CPU.
"""

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

QUANTUM_S = 0.5
"""By how much a model may be ahead: a device is not to idle between two pieces of work."""


@dataclass(slots=True)
class _Device:
    served: dict[str, float] = field(default_factory=dict[str, float])
    busy: Set[str] = frozenset()
    working: Set[str] = frozenset()
    at: float | None = None


class DeviceShares:
    """Models are weighted by `weights`; who is not in it has 1. Without weights nobody is held back."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._devices = defaultdict[str, _Device](_Device)

    def __bool__(self) -> bool:
        return bool(self._weights)

    def passed(self, device: str, busy: Set[str], working: Set[str], now: float) -> None:
        """From now on the device has work of those that are `working`, and those that are `busy` have some, there or
        waiting. One that was not is lifted to the least served of those that were."""
        state = self._devices[device]
        if state.at is not None:
            for model in state.working:
                state.served[model] += max(0.0, now - state.at) / len(state.working) / self._weight(model)
        floor = min((state.served[model] for model in state.busy), default=max(state.served.values(), default=0.0))
        for model in busy - state.busy:
            state.served[model] = max(state.served.get(model, 0.0), floor)
        state.busy, state.working, state.at = frozenset(busy), frozenset(working & busy), now

    def held_back(self, device: str, model: str) -> float:
        """For how many seconds a model gets nothing new there, should nothing change until then; 0 where it may."""
        state = self._devices[device]
        if model not in state.busy:
            return 0.0
        least = min(state.busy, key=lambda each: state.served[each])
        ahead = state.served[model] - state.served[least] - QUANTUM_S / self._weight(model)
        if ahead <= 0:
            return 0.0
        # The least served catches up at its part of the device's time, by its weight.
        return max(0.01, ahead * self._weight(least) * max(1, len(state.working | {least})))

    def _weight(self, model: str) -> float:
        return self._weights.get(model, 1.0)
