"""How fast each base model's work goes, by what has ended lately. Pure: the time is passed in, in Unix seconds."""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

Mode: TypeAlias = Literal["train", "sample"]
WINDOW_S = 60.0
_SHORTEST_S = 1.0
"""Less says nothing."""


class Rate(NamedTuple):
    """Tokens a second, over so many seconds until now."""

    tokens_per_s: float
    over_s: float


@dataclass(slots=True)
class _Busy:
    """Since when there has been work all the time, and what ended in each second of it."""

    since: float | None = None
    ended: deque[tuple[int, int]] = field(default_factory=deque[tuple[int, int]])


class Rates:
    def __init__(self) -> None:
        self._busy = defaultdict[tuple[str, Mode], _Busy](_Busy)

    def ended(self, base_model: str, mode: Mode, tokens: int, now: float, *, is_busy: bool) -> None:
        """A command of so many tokens. Where none is left (not `is_busy`), the time until the next counts for nothing,
        and neither does the first command after that, of which nobody knows how long it took."""
        busy = self._busy[base_model, mode]
        if not is_busy:
            busy.since = None
            busy.ended.clear()
        elif busy.since is None:
            busy.since = now
        elif busy.ended and busy.ended[-1][0] == int(now):
            busy.ended[-1] = (int(now), busy.ended[-1][1] + tokens)
        else:
            busy.ended.append((int(now), tokens))
            while busy.ended[0][0] < now - WINDOW_S - 1:
                busy.ended.popleft()

    def rate(self, base_model: str, mode: Mode, now: float) -> Rate | None:
        """None where nothing ended for a minute, or nobody knows yet."""
        busy = self._busy[base_model, mode]
        if busy.since is None:
            return None
        began = max(busy.since, now - WINDOW_S)
        tokens = sum(tokens for at, tokens in busy.ended if at >= int(began))
        if tokens == 0 or now - began < _SHORTEST_S:
            return None
        return Rate(tokens / (now - began), now - began)
