"""Who has the device next, training or sampling, and how much of the training. Pure: it is told what everything took.

While both want the device, sampling gets `sample_share` of its time. A step of decoding that takes d seconds earns
training d (1 - share) / share seconds, and a pass of training is laid out to take just what is owed: so two tokens of a
sequence are d / share apart, where passes can be split so far.
"""

FIRST_GUESS = 256
"""Tokens of a pass before any was measured."""
WEIGHT_OF_LATEST = 0.3


class Turns:
    def __init__(self, sample_share: float, token_budget: int) -> None:
        """Raises ValueError for a share that is not between 0 and 1."""
        if not 0 < sample_share < 1:
            raise ValueError(f"sample_share is {sample_share}, expected a number between 0 and 1")
        self._share, self._token_budget = sample_share, token_budget
        self._lead_s = 0.0  # of training over its share, in seconds of both together
        self._trained_s = 0.0  # what the latest pass took; 0 where sampling came after it
        self._s_per_token: float | None = None
        self._step_s: float | None = None

    @property
    def sampling_is_due(self) -> bool:
        """While both want the device. After a pass, training goes on only if another one is nearer to its share."""
        if self._lead_s > 0:
            return True
        return self._trained_s > 0 and self.owed_s < self._trained_s / 2

    @property
    def owed_s(self) -> float:
        """How long training may go on until sampling is due."""
        return max(0.0, -self._lead_s) * (1 - self._share)

    @property
    def pass_tokens(self) -> int:
        """How many tokens a pass should have to take as long as training is owed, by the speed of earlier ones.

        What a step earns sets limits to it, since it is to serve for all passes of a micro-batch.
        """
        if self._s_per_token is None or self._step_s is None:
            return min(FIRST_GUESS, self._token_budget)
        earned_s = self._step_s * (1 - self._share) / self._share
        pass_s = min(max(self.owed_s, earned_s / 2), earned_s * 1.5)
        return max(1, min(self._token_budget, int(pass_s / self._s_per_token)))

    def measured(self, tokens: int, spent_s: float) -> None:
        """A pass of `tokens` took `spent_s`."""
        self._s_per_token = _smoothed(self._s_per_token, spent_s / tokens)

    def trained(self, spent_s: float, contended: bool) -> None:
        """Training had the device for `spent_s`; `contended` says whether sampling wanted it too."""
        self._trained_s = spent_s
        self._add(spent_s / (1 - self._share), contended)

    def sampled(self, spent_s: float, contended: bool) -> None:
        self._trained_s = 0.0
        self._step_s = _smoothed(self._step_s, spent_s)
        self._add(-spent_s / self._share, contended)

    def _add(self, weighted_s: float, contended: bool) -> None:
        """Who is ahead counts only while both want the device."""
        self._lead_s = self._lead_s + weighted_s if contended else weighted_s


def _smoothed(earlier: float | None, latest: float) -> float:
    return latest if earlier is None else earlier + WEIGHT_OF_LATEST * (latest - earlier)
