"""Who has the device next, training or sampling, and how long. Pure: it is told what everything took.

While both want the device, sampling gets `sample_share` of its time, or a little more. A step of decoding that takes d
seconds earns training d (1 - share) / share seconds. A pass of training stops between its products when what is left of
these is less than the latest product took: so two tokens of a sequence are d / share apart at most, and what is left is
forgotten. What a step earns that took longer than most, as one with a prompt does, is spread over many turns.
"""

SPREAD = 16
"""Over how many, about."""
WEIGHT_OF_LATEST = 0.05
"""In what a step usually earns."""


class Turns:
    def __init__(self, sample_share: float) -> None:
        """Raises ValueError for a share that is not between 0 and 1."""
        if not 0 < sample_share < 1:
            raise ValueError(f"sample_share is {sample_share}, expected a number between 0 and 1")
        self._share = sample_share
        self._lead_s = 0.0  # of training over its share, in seconds of both together
        self._trained_s = 0.0  # what the latest piece took; 0 where sampling came after it
        self._usual_s: float | None = None  # that a step earns
        self._turn_s = 0.0  # what is left of training's turn

    @property
    def sampling_is_due(self) -> bool:
        """While both want the device. After a piece, training goes on only if there is time for another one."""
        return self._lead_s > 0 or self.owed_s < self._trained_s

    @property
    def owed_s(self) -> float:
        """How long training may go on until sampling is due."""
        return max(0.0, min(self._turn_s, self._behind_s))

    def trained(self, spent_s: float, contended: bool) -> None:
        """A piece of training had the device for `spent_s`; `contended` says whether sampling wanted it too."""
        self._trained_s = spent_s
        self._turn_s -= spent_s
        self._add(spent_s / (1 - self._share), contended)

    def sampled(self, spent_s: float, contended: bool) -> None:
        if self.owed_s < self._trained_s:
            self._lead_s += self.owed_s / (1 - self._share)
        self._trained_s = 0.0
        self._add(-spent_s / self._share, contended)
        earned_s = spent_s * (1 - self._share) / self._share
        usual_s = earned_s if self._usual_s is None else self._usual_s
        self._usual_s = usual_s + WEIGHT_OF_LATEST * (min(earned_s, 2 * usual_s) - usual_s)
        self._turn_s = self._usual_s + (self._behind_s - self._usual_s) / SPREAD

    @property
    def _behind_s(self) -> float:
        """How long training would have to go on to have its share; below 0 where it had more."""
        return -self._lead_s * (1 - self._share)

    def _add(self, weighted_s: float, contended: bool) -> None:
        """Who is ahead counts only while both want the device."""
        self._lead_s = self._lead_s + weighted_s if contended else weighted_s
