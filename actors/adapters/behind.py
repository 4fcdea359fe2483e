"""What stands between a run and its newest saved state, and when it is to be saved again. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

REPLAY_BYTES = 64 * 2**20
RETRY_S = 10.0
"""After a snapshot that the disk refused."""


@dataclass(slots=True)
class Behind:
    """The commands that a replay would repeat: what they took of the device when they ran, with whoever ran beside
    them, how much the journal keeps for them, and when the last of them was."""

    replay_s: float = 0.0
    replay_bytes: int = 0
    changed_at: float = 0.0

    def after(self, earlier: "Behind") -> "Behind":
        """Both, where `earlier` came before."""
        bytes_ = earlier.replay_bytes + self.replay_bytes
        return Behind(earlier.replay_s + self.replay_s, bytes_, max(earlier.changed_at, self.changed_at))


@dataclass(frozen=True, slots=True)
class SnapshotPolicy:
    """Repeating what is behind a run's newest saved state is to cost at most `recovery_s` of the device. So it is due
    at half of that, which leaves as much for the time until a snapshot is there; or once the journal holds
    REPLAY_BYTES for it; or once nothing has changed it for `idle_s`. Times are in seconds."""

    recovery_s: float = 20.0
    idle_s: float = 60.0

    def most_due(self, runs: Mapping[str, Behind], now: float) -> str | None:
        """Of those with something behind them: the one whose replay would cost most."""
        due = [key for key, behind in runs.items() if self.due_at(behind) <= now]
        return max(due, key=lambda key: runs[key].replay_s, default=None)

    def due_at(self, behind: Behind) -> float:
        """When it is due, should nothing change it until then."""
        if behind.replay_s >= self.recovery_s / 2 or behind.replay_bytes >= REPLAY_BYTES:
            return float("-inf")
        return behind.changed_at + self.idle_s
