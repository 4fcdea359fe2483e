"""One tenant's samples that wait: by priority, then as they came. Pure."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import replace

from ...wire.ids import FutureId, LaneId
from .lanes import Command

_Key = tuple[int, int]
"""Minus the priority, and the place in the order of arrival."""


class Queue:
    def __init__(self) -> None:
        self._order: list[_Key] = []
        self._commands: dict[_Key, Command] = {}
        self._keys: dict[FutureId, _Key] = {}
        self._last = self._first = 0
        self.tokens = 0

    def __iter__(self) -> Iterator[Command]:
        """In order; nothing may be added or removed meanwhile."""
        return (self._commands[key] for key in self._order)

    def __len__(self) -> int:
        return len(self._order)

    def append(self, command: Command) -> None:
        self._last += 1
        self._add((-command.priority, self._last), command)

    def put_back(self, command: Command) -> None:
        """It was first of its priority, and is again."""
        self._first -= 1
        self._add((-command.priority, self._first), command)

    def find(self, future: FutureId) -> Command | None:
        key = self._keys.get(future)
        return None if key is None else self._commands[key]

    def remove(self, command: Command) -> None:
        key = self._keys.pop(command.future)
        del self._order[self._at(key)]
        del self._commands[key]
        self.tokens -= command.cost

    def before(self, future: FutureId) -> int:
        """How many are before one that waits here."""
        return self._at(self._keys[future])

    def prioritise(self, lane: LaneId, priority: int) -> None:
        """What waits of one sampler; it keeps its place among those of the same priority."""
        moved = [item for item in self._commands.items() if item[1].lane == lane and item[1].priority != priority]
        if not moved:
            return
        for key, command in moved:
            del self._commands[key]
            new = -priority, key[1]
            self._commands[new], self._keys[command.future] = replace(command, priority=priority), new
        self._order = sorted(self._commands)

    def _add(self, key: _Key, command: Command) -> None:
        insort(self._order, key)
        self._commands[key], self._keys[command.future] = command, key
        self.tokens += command.cost

    def _at(self, key: _Key) -> int:
        return bisect_left(self._order, key)
