"""Which adapters are hot, on the device, and which are warm, in host memory. Knows keys, never whose they are."""

from collections import OrderedDict
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager

import torch

from ..model.adapter import Adapter


class AdapterPool:
    """At most `slots` adapters on `device`, the rest in host memory; the least recently used makes room first.

    `swaps_in` and `swaps_out` count moves to and from the device.
    """

    def __init__(
        self, slots: int, device: torch.device | str, host: torch.device | str = "cpu", *, lends: bool = False
    ) -> None:
        """One that `lends` moves no adapter to the device: where several devices share a model, it goes when it is
        used."""
        if slots < 1:
            raise ValueError(f"slots is {slots}, expected at least 1")
        self.slots = slots
        self.device = torch.device(device)
        self.host = torch.device(host)
        self._lends = lends
        self.swaps_in = 0
        self.swaps_out = 0
        self._adapters: dict[str, Adapter] = {}
        self._hot: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._all_bytes = 0
        self._hot_bytes = 0
        self._pinned: frozenset[str] = frozenset()

    def __contains__(self, key: str) -> bool:
        return key in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def hot(self) -> list[str]:
        """The keys on the device, least recently used first."""
        return list(self._hot)

    @property
    def used(self) -> int:
        """How many slots hold an adapter; from any thread."""
        return len(self._hot)

    @property
    def host_bytes(self) -> int:
        """What adapters take of host memory."""
        return self._all_bytes - (self._hot_bytes if self.device != self.host else 0)

    def add(self, key: str, adapter: Adapter) -> None:
        """Takes charge of `adapter`; it stays in host memory until acquired. Raises ValueError on a known key."""
        if key in self._adapters:
            raise ValueError(f"adapter {key!r} is in the pool already")
        adapter.to(self.host)
        self._adapters[key] = adapter
        self._all_bytes += adapter.nbytes

    def get(self, key: str) -> Adapter:
        """The adapter wherever it is, without counting as a use. Raises KeyError on an unknown key."""
        return self._adapters[key]

    def remove(self, key: str) -> Adapter:
        """Raises KeyError on an unknown key."""
        adapter = self._adapters.pop(key)
        self._all_bytes -= adapter.nbytes
        if key in self._hot:
            self._cool(key, adapter)
        return adapter

    def acquire(self, keys: Sequence[str]) -> list[Adapter]:
        """The adapters of `keys`, all on the device until the next call. At most `slots` distinct keys, with those
        that are pinned.

        Raises KeyError on an unknown key, before anything moves.
        """
        wanted = dict.fromkeys(keys)
        if not self.has_room(wanted):
            raise ValueError(
                f"{len(wanted)} adapters wanted at once, beside {len(self._pinned)} that are pinned, "
                f"expected at most {self.slots}, the pool's slots"
            )
        adapters = {key: self._adapters[key] for key in wanted}
        cold = [key for key in wanted if key not in self._hot]
        idle = (key for key in self.hot if key not in wanted and key not in self._pinned)
        for _ in range(len(self._hot) + len(cold) - self.slots):
            self._release(next(idle))
        for key in cold:
            if not self._lends:
                adapters[key].to(self.device)
            self.swaps_in += 1
            self._hot[key] = None
            self._hot_bytes += adapters[key].nbytes
        for key in wanted:
            self._hot.move_to_end(key)
        return [adapters[key] for key in keys]

    def has_room(self, keys: Collection[str]) -> bool:
        """Whether `acquire` could take them all, distinct or not."""
        return len(self._pinned.union(keys)) <= self.slots

    @contextmanager
    def pin(self, keys: Collection[str]) -> Generator[None]:
        """Inside, adapters that were acquired stay where they are, whoever else is."""
        self._pinned = frozenset(keys)
        try:
            yield
        finally:
            self._pinned = frozenset()

    def _release(self, key: str) -> None:
        adapter = self._adapters[key]
        adapter.to(self.host)
        self._cool(key, adapter)
        self.swaps_out += 1

    def _cool(self, key: str, adapter: Adapter) -> None:
        del self._hot[key]
        self._hot_bytes -= adapter.nbytes
