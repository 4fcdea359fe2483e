"""Who may show another key, after wrong ones; and what is remembered of keys for a while. Pure: memory is bounded, and
the time is passed in, in seconds of any clock that does not go back."""

import math
from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")

_ROUNDING = 1e-9


class Attempts:
    """A bucket for each peer: it has `burst` tries at once, and another one every `every_s` seconds. A try that turns
    out right is given back. The `peers_at_most` that tried last are remembered; to the others all is forgiven."""

    def __init__(self, burst: int = 20, every_s: float = 1.0, peers_at_most: int = 10_000) -> None:
        self._burst, self._every_s, self._peers_at_most = burst, every_s, peers_at_most
        self._peers = OrderedDict[str, tuple[float, float]]()  # how many tries, of which moment

    def take(self, peer: str, now: float) -> float:
        """0 where the peer may try, which is counted; or after how many seconds it may."""
        tries = self._tries(peer, now)
        after_s = max(0.0, tries + 1 - self._burst) * self._every_s
        if after_s > _ROUNDING:
            self._peers.move_to_end(peer)
            return after_s
        self._peers[peer] = tries + 1, now
        self._peers.move_to_end(peer)
        if len(self._peers) > self._peers_at_most:
            self._peers.popitem(last=False)
        return 0.0

    def give_back(self, peer: str, now: float) -> None:
        """One of its tries was none."""
        if peer in self._peers:
            if (tries := self._tries(peer, now)) > 1:
                self._peers[peer] = tries - 1, now
            else:
                del self._peers[peer]

    def _tries(self, peer: str, now: float) -> float:
        tries, at = self._peers.get(peer, (0.0, now))
        return max(0.0, tries - (now - at) / self._every_s)

    def __len__(self) -> int:
        return len(self._peers)


class Pace:
    """Moments for each peer, `every_s` seconds apart; of the `peers_at_most` that asked last they are remembered."""

    def __init__(self, every_s: float, at_most_s: float, peers_at_most: int = 10_000) -> None:
        self._every_s, self._at_most_s, self._peers_at_most = every_s, at_most_s, peers_at_most
        self._next = OrderedDict[str, float]()

    def wait_s(self, peer: str, now: float) -> float:
        """Until this one's turn, `at_most_s` seconds."""
        turn = min(max(now, self._next.get(peer, now)), now + self._at_most_s)
        self._next[peer] = turn + self._every_s
        self._next.move_to_end(peer)
        if len(self._next) > self._peers_at_most:
            self._next.popitem(last=False)
        return turn - now


class Lately(Generic[V]):
    """What was said of a name, for `for_s` seconds; of `at_most` names, those of which something was said last."""

    def __init__(self, at_most: int, for_s: float = math.inf) -> None:
        self._at_most, self._for_s = at_most, for_s
        self._said = OrderedDict[str, tuple[V, float]]()

    def say(self, name: str, what: V, now: float) -> None:
        self._said[name] = what, now
        self._said.move_to_end(name)
        if len(self._said) > self._at_most:
            self._said.popitem(last=False)

    def of(self, name: str, now: float) -> V | None:
        if (found := self._said.get(name)) is None:
            return None
        what, at = found
        return what if now - at < self._for_s else None

    def forget(self, name: str) -> None:
        self._said.pop(name, None)

    def __len__(self) -> int:
        return len(self._said)
