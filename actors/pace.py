"""How many tokens a second an actor has trained lately. Pure."""

from dataclasses import dataclass

_KEPT = 0.75
"""Of what was measured before, at each measure: a few of the last ones count."""


@dataclass(slots=True)
class Pace:
    """Of passes of at least so many tokens: small ones take longer for each."""

    least_tokens: int
    _tokens: float = 0.0
    _seconds: float = 0.0

    def measured(self, tokens: int, seconds: float) -> None:
        if tokens >= max(1, self.least_tokens) and seconds > 0:
            self._tokens = _KEPT * self._tokens + tokens
            self._seconds = _KEPT * self._seconds + seconds

    @property
    def tokens_per_s(self) -> float:
        """0 while nothing was."""
        return self._tokens / self._seconds if self._seconds else 0.0
