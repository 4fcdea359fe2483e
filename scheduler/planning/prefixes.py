"""Which actors have computed which beginnings of prompts, as far as they were told to lately. Pure.

It is a guess: an actor forgets what its cache has no room for, and says nothing of it.
"""

from collections import OrderedDict
from collections.abc import Sequence

from ...wire.ids import ActorId


class Prefixes:
    def __init__(self, at_most: int = 2**16) -> None:
        """So many marks are remembered; those that were not met for longest go first."""
        self._at_most = at_most
        self._holders: OrderedDict[str, set[ActorId]] = OrderedDict()

    def computed(self, marks: Sequence[str], actor: ActorId) -> None:
        for mark in reversed(marks):  # of a prompt, the beginnings are met longest
            self._holders.setdefault(mark, set()).add(actor)
            self._holders.move_to_end(mark)
        while len(self._holders) > self._at_most:
            self._holders.popitem(last=False)

    def known(self, marks: Sequence[str], actor: ActorId) -> float:
        """Which share of a prompt with these marks `actor` has computed, 0 to 1."""
        found = (i for i in range(len(marks), 0, -1) if actor in self._holders.get(marks[i - 1], ()))
        return next(found, 0) / len(marks) if marks else 0.0

    def forget(self, actor: ActorId) -> None:
        """It is gone, and its cache with it."""
        for holders in self._holders.values():
            holders.discard(actor)
