"""Whether the compute thread gets on with its work. Written by that thread, read by the event loop beside it."""

import time

MULTIPLE = 20
"""Of the longest stretch without progress so far: models and devices differ, what is usual on one does not."""


class Progress:
    """`least_s` is how long a stretch may always take, in seconds."""

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._longest_s = 0.0
        self._since: float | None = None

    def got_on(self) -> None:
        """Something begins, or a piece of it is done."""
        self._end_stretch(time.monotonic())

    def rests(self) -> None:
        """There is nothing to do."""
        self._end_stretch(None)

    def hangs_s(self) -> float | None:
        """How long nothing has come of what is being done, if that is too long; None otherwise."""
        since = self._since
        spent_s = 0.0 if since is None else time.monotonic() - since
        return spent_s if spent_s > max(self._least_s, MULTIPLE * self._longest_s) else None

    def _end_stretch(self, now: float | None) -> None:
        if self._since is not None:
            self._longest_s = max(self._longest_s, time.monotonic() - self._since)
        self._since = now
