"""The adapters that live in this actor: made from a seed or from a folder when a micro-batch first names them."""

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

from ...wire.actor_messages import AdapterState
from ...wire.types import LoraConfig
from ..model.adapter import Adapter, AdapterSpec
from ..model.lora import LoraTargets
from .slots import AdapterPool
from .snapshots import load_sampler_weights, restore_state


class Residents:
    def __init__(self, targets: LoraTargets, pool: AdapterPool, kept_samplers: int) -> None:
        self._targets, self.pool, self._kept_samplers = targets, pool, kept_samplers
        self._samplers: OrderedDict[str, None] = OrderedDict()  # least recently used first

    def run(self, state: AdapterState) -> str:
        """The pool's key of a run's adapter, which is what it was when its folder was saved, pending gradient included.

        Raises InvalidRequestError, CheckpointError.
        """
        if state.key not in self.pool:
            adapter = self._targets.new_adapter(_spec(state.lora), self.pool.host)
            if state.folder is not None:
                restore_state(adapter, Path(state.folder))
            self.pool.add(state.key, adapter)
        return state.key

    def sampler(self, state: AdapterState, in_use: Collection[str]) -> str:
        """The pool's key of sampler weights; some that are not `in_use` may go. Raises CheckpointError."""
        if state.key not in self.pool:
            assert state.folder is not None
            self.pool.add(state.key, load_sampler_weights(self._targets, Path(state.folder), self.pool.host))
        self._samplers[state.key] = None
        self._samplers.move_to_end(state.key)
        idle = [key for key in self._samplers if key not in in_use and key != state.key]
        for key in idle[: max(0, len(self._samplers) - self._kept_samplers)]:
            self.forget(key)
        return state.key

    def get(self, key: str) -> Adapter:
        return self.pool.get(key)

    def forget(self, key: str) -> None:
        self._samplers.pop(key, None)
        if key in self.pool:
            self.pool.remove(key)


def _spec(lora: LoraConfig) -> AdapterSpec:
    return AdapterSpec(
        rank=lora.rank,
        seed=lora.seed or 0,
        train_attn=lora.train_attn,
        train_mlp=lora.train_mlp,
        train_unembed=lora.train_unembed,
    )
