"""Which runs have changed since they were saved, and since when. Pure; times are passed in, in Unix seconds."""

from ...wire.ids import LaneId


class Unsaved:
    """Since the broker started: what came before is in the journal, and is replayed when it is wanted."""

    def __init__(self) -> None:
        self._since: dict[LaneId, float] = {}  # the oldest first
        self._last_seq: dict[LaneId, int] = {}
        self.newest_save_at: float | None = None

    def __len__(self) -> int:
        return len(self._since)

    def changed(self, run: LaneId, seq: int, at: float) -> None:
        """A command changed the run's state."""
        self._last_seq[run] = seq
        self._since.setdefault(run, at)

    def saved(self, run: LaneId, seq: int, at: float) -> None:
        """All up to `seq` is saved. Of what came behind it the first is not known: it is taken to be as old as this."""
        self.newest_save_at = at
        if self._since.pop(run, None) is None:
            return
        if self._last_seq[run] > seq:
            self._since[run] = at
        else:
            del self._last_seq[run]

    def forget(self, run: LaneId) -> None:
        """It is lost, and will not be saved."""
        self._since.pop(run, None)
        self._last_seq.pop(run, None)

    def oldest_at(self) -> float | None:
        """Since when the run that waits longest has not been saved."""
        return next(iter(self._since.values()), None)
