"""Whose the device's time was, of commands that shared a pass. Pure."""

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from ..wire.ids import FutureId
from .training.trainer import Ended


def with_device_time(ended: Mapping[FutureId, Any], pass_s: float) -> dict[FutureId, Ended]:
    """Those that have ended, each with its share of the pass's seconds: by the tokens that were computed for it, and
    one for each command, so that a step beside a batch counts for little, and one alone for all."""
    ends: dict[FutureId, Ended] = {future: end for future, end in ended.items() if isinstance(end, tuple)}
    weights = {future: 1 + outcome.train_tokens + outcome.prefill_tokens for future, (outcome, _) in ends.items()}
    each_s = pass_s / sum(weights.values(), 0 if ends else 1)
    return {
        future: (replace(outcome, device_s=round(weights[future] * each_s, 6)), result)
        for future, (outcome, result) in ends.items()
    }
