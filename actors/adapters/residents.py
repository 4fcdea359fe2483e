"""The adapters that live in this actor: hot on the device, warm in host memory, cold in their newest saved states.

They are made, or read from a folder, when a command first names them. Host memory stays within a budget: what was used
least recently leaves it, a run after its state is saved.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TypeAlias

import structlog

from ...wire.actor_messages import AdapterState, Item, SnapshotFailed, SnapshotTaken
from ...wire.commands import REPLAYED_KINDS
from ...wire.errors import CheckpointError, LorryError
from ...wire.types import LoraConfig
from ..model.adapter import Adapter
from ..model.lora import LoraTargets
from ..model.memory import give_back_freed
from ..model.spec import AdapterSpec
from .behind import RETRY_S, Behind, SnapshotPolicy
from .checkpoints import load_sampler_weights
from .samplers import SamplerSave
from .shares import load_weights
from .slots import AdapterPool
from .snapshots import Snapshot, restore_state, write_snapshot

log = structlog.get_logger("lorry.actor")

_AT_MOST_S = 24 * 3600.0
"""A queue cannot be waited at for any time that a setting may name."""
_KEPT_BY_ALLOCATOR = 8 << 20
"""Bytes: of adapters that have left, and of copies, before the allocator is asked to keep nothing of them. Less in a
small budget, since they count in it."""
_NOT_COUNTED = 16
"""One part in so many is for what adapters take beside their vectors: objects, names, queues, and holes in the heap."""
Written: TypeAlias = SnapshotTaken | SnapshotFailed


@dataclass(slots=True)
class _Run:
    """`folder` holds its state up to `saved_seq`, None what its seed makes; `seq` is its latest command here. Its next
    snapshot goes to `next_folder`, which is None while the broker has not named one."""

    lora: LoraConfig
    folder: str | None
    next_folder: str | None
    saved_seq: int = -1
    seq: int = -1


class Residents:
    """`host_bytes` bound what adapters take of host memory, but for those in use. `tell` is told of each snapshot. Who
    calls `make_room`, which may save runs, has told the broker before of what they did."""

    def __init__(
        self,
        targets: LoraTargets,
        pool: AdapterPool,
        host_bytes: int,
        policy: SnapshotPolicy,
        tell: Callable[[Written], None],
    ) -> None:
        self._targets, self.pool = targets, pool
        self._host_bytes = host_bytes - host_bytes // _NOT_COUNTED
        self._policy, self._tell = policy, tell
        self._used: OrderedDict[str, None] = OrderedDict()  # all in the pool, least recently used first
        self._held: Counter[str] = Counter()
        self._runs: dict[str, _Run] = {}
        self._behind: dict[str, Behind] = {}
        self._writing: dict[str, Behind] = {}
        self._copies: dict[str, str] = {}  # of runs that live elsewhere: the folders that their weights came from
        self._not_before = 0.0
        self._freed_bytes, self._kept_bytes = 0, min(_KEPT_BY_ALLOCATOR, host_bytes // 16)

    # In and out ------------------------------------------------------------------------------------------------------

    def hold_runs(self, states: Collection[AdapterState]) -> dict[str, LorryError]:
        """Until `release` they are here, each as the commands before left it; and what is wrong with those that cannot
        be: InvalidRequestError, or CheckpointError where a run's folder does not give it back."""
        return self._hold(states, self._fetch_run)

    def hold_copies(self, states: Collection[AdapterState]) -> dict[str, LorryError]:
        """Until `release`, runs that live elsewhere are here, too, with the weights of their folders and no gradient;
        and what is wrong with those that cannot be."""
        return self._hold(states, self._fetch_copy)

    def hold_sampler(self, state: AdapterState) -> str:
        """The pool's key of sampler weights, which are here until `release`. Raises CheckpointError."""
        self._held[state.key] += 1
        try:
            if state.key not in self.pool:
                assert state.folder is not None
                self._add(state.key, load_sampler_weights(self._targets, Path(state.folder), self.pool.host))
        except LorryError:
            self.release([state.key])
            raise
        self._used.move_to_end(state.key)
        return state.key

    def release(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._held[key] -= 1
        self._held = +self._held  # those of nobody are not counted

    def get(self, key: str) -> Adapter:
        return self.pool.get(key)

    def make_room(self) -> None:
        """Whoever nobody uses leaves host memory, the least recently used first, until the rest is within bounds."""
        excess = self.pool.host_bytes + self._freed_bytes - self._host_bytes
        for key in list(self._used) if excess > 0 else ():
            if excess <= 0:
                break
            adapter = self.pool.get(key)
            if self._held[key] == 0 and adapter.device == self.pool.host and self._is_safe(key):
                excess -= adapter.nbytes
                self._freed_bytes += adapter.nbytes
                self.pool.remove(key)
                del self._used[key]
                self._copies.pop(key, None)
        if self._freed_bytes > self._kept_bytes:
            self._freed_bytes = 0
            give_back_freed()

    def _hold(self, states: Collection[AdapterState], fetch: Callable[[AdapterState], None]) -> dict[str, LorryError]:
        problems: dict[str, LorryError] = {}
        self._held.update(state.key for state in states)
        for state in states:
            try:
                fetch(state)
            except LorryError as error:
                problems[state.key] = error
        return problems

    def _fetch_run(self, state: AdapterState) -> None:
        run = self._runs.get(state.key)
        if run is None:
            run = _Run(state.lora, state.folder, state.snapshot)
        if state.key not in self.pool:
            adapter = self._targets.new_adapter(spec_of(run.lora), self.pool.host)
            if run.folder is not None:
                self._restore(state.key, adapter, run.folder)
            self._add(state.key, adapter)
        self._runs[state.key] = run
        self._used.move_to_end(state.key)

    def _fetch_copy(self, state: AdapterState) -> None:
        key, folder = state.key, state.folder
        assert folder is not None
        if key not in self.pool:
            adapter = self._targets.new_adapter(spec_of(state.lora), self.pool.host)
            load_weights(adapter, Path(folder))
            self._add(key, adapter)
        elif self._copies.get(key) != folder:
            load_weights(self.pool.get(key), Path(folder))
        self._copies[key] = folder
        self._used.move_to_end(key)

    def _restore(self, key: str, adapter: Adapter, folder: str) -> None:
        """Where it does not come back from there, the broker decides what it is to come from, and what follows."""
        try:
            restore_state(adapter, Path(folder))
            self._freed_bytes += adapter.nbytes  # what was read
        except CheckpointError:
            self._runs.pop(key, None)
            raise

    def _add(self, key: str, adapter: Adapter) -> None:
        self.pool.add(key, adapter)
        self._used[key] = None
        self.make_room()

    def _is_safe(self, key: str) -> bool:
        """Whether all that an adapter has learnt is on disk; a run's is put there, unless that must wait."""
        if key in self._behind and self._may_write(key):
            self.save(key)
        return key not in self._behind and key not in self._writing

    # Snapshots -------------------------------------------------------------------------------------------------------

    def executed(self, item: Item, payload_bytes: int) -> None:
        """A run's command took effect here, or failed for good."""
        assert item.adapter is not None
        key = item.adapter.key
        run = self._runs[key]
        run.seq = max(run.seq, item.seq)
        if item.kind in REPLAYED_KINDS:
            behind = self._behind.setdefault(key, Behind())
            behind.replay_bytes += payload_bytes
            behind.changed_at = time.monotonic()

    def saved(self, item: Item) -> None:
        """The run's whole state is in the folder that a save of its own wrote."""
        assert item.adapter is not None
        run = self._runs[item.adapter.key]
        run.folder, run.saved_seq = item.folder, item.seq
        self._behind.pop(item.adapter.key, None)

    def copy_for_sampling(self, item: Item, base_model: str) -> SamplerSave:
        """The run's weights as they are, which stay here under their folder's name: who asks for them, once they are
        written, finds them."""
        assert item.adapter is not None and item.folder is not None
        key, targets = item.adapter.key, self._targets
        run = self.pool.get(key)
        save = SamplerSave(
            key, item.future, item.folder, run.spec, run.targets, run.weights_copy(), targets, base_model
        )
        self.forget_copy(item.folder)  # of the same command, which the broker took back and gave again
        self._add(item.folder, save.adapter(self._targets.dtype))
        return save

    def forget_copy(self, folder: str) -> None:
        """Its weights were not saved, and nobody will ask for them."""
        if folder in self.pool:
            self.pool.remove(folder)
            del self._used[folder]

    def charge(self, keys: Iterable[str], spent_s: float) -> None:
        """They were changed together, in `spent_s` of the device: to repeat it costs each of them that at the most."""
        for key in keys:
            if behind := self._behind.get(key):
                behind.replay_s += spent_s

    def replay_s(self, key: str) -> float:
        return sum(known[key].replay_s for known in (self._behind, self._writing) if key in known)

    def due_snapshot(self) -> Snapshot | None:
        """A copy of what is to be written next, beside whatever else goes on; `written` is to be told of it. There is
        one at a time."""
        if self._writing:
            return None
        waiting = {key: self._behind[key] for key in self.unsaved()}
        key = self._policy.most_due(waiting, time.monotonic())
        if key is None:
            return None
        self._freed_bytes += self.pool.get(key).nbytes  # soon: one copy at a time
        return self._begin(key, copied=True)

    def due_in_s(self) -> float | None:
        """How long until there is one, should nothing else happen; None for ever."""
        waiting = [behind for key, behind in self._behind.items() if self._runs[key].next_folder is not None]
        if self._writing or not waiting:
            return None
        soonest = max(self._not_before, min(self._policy.due_at(behind) for behind in waiting))
        return None if soonest == inf else min(_AT_MOST_S, max(0.0, soonest - time.monotonic()))

    def unsaved(self) -> list[str]:
        """What `save` would write now."""
        return [key for key in self._behind if self._may_write(key)]

    def save(self, key: str) -> None:
        self.written(write_snapshot(self._begin(key, copied=False)))

    @property
    def all_saved(self) -> bool:
        """Or the disk refuses what is not."""
        return not self._writing and (not self._behind or time.monotonic() < self._not_before)

    def written(self, message: Written) -> None:
        key = message.run
        earlier, run = self._writing.pop(key), self._runs[key]
        if isinstance(message, SnapshotTaken):
            if message.seq > run.saved_seq:
                run.folder, run.saved_seq = message.folder, message.seq
            message = SnapshotTaken(key, message.folder, message.seq, self.replay_s(key))
        else:
            log.warning("a snapshot could not be written", run=key, why=message.reason)
            self._behind[key] = self._behind.get(key, Behind()).after(earlier)
            run.next_folder, self._not_before = message.folder, time.monotonic() + RETRY_S
        self._tell(message)

    def recorded(self, key: str, next_folder: str) -> None:
        """The broker knows the run's newest snapshot, and has named the next one's folder."""
        if run := self._runs.get(key):
            run.next_folder = next_folder

    def _may_write(self, key: str) -> bool:
        """Not while it is being written, nor soon after the disk refused one."""
        return self._runs[key].next_folder is not None and time.monotonic() >= self._not_before

    def _begin(self, key: str, *, copied: bool) -> Snapshot:
        run = self._runs[key]
        assert run.next_folder is not None
        snapshot = Snapshot(key, run.next_folder, run.seq, self.pool.get(key).state(copied=copied))
        self._writing[key], run.next_folder = self._behind.pop(key), None
        return snapshot


def spec_of(lora: LoraConfig) -> AdapterSpec:
    return AdapterSpec(
        rank=lora.rank,
        seed=lora.seed or 0,
        train_attn=lora.train_attn,
        train_mlp=lora.train_mlp,
        train_unembed=lora.train_unembed,
        expert_lora=lora.expert_lora,
        alpha=lora.alpha,
        target_modules=None if lora.target_modules is None else tuple(lora.target_modules),
    )
