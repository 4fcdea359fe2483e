"""When the requests of an open loop arrive: at times that no server has a say in. Pure."""

import itertools
import math
from collections.abc import Iterator
from random import Random

from .workload import Burst, OpenLoop, Poisson, Recorded


def arrivals(arrival: OpenLoop, random: Random) -> Iterator[float]:
    """Seconds from the start, without an end but for what was recorded.

    While the rate grows evenly from nothing within r seconds, what has come by t is rate t^2 / 2r, and rate (t - r / 2)
    from then on: arrivals of rate 1 are moved to where that is theirs, whatever their gaps are drawn from.
    """
    if isinstance(arrival, Recorded):
        yield from arrival.at_s
    elif isinstance(arrival, Burst):
        for start in itertools.count():
            yield from itertools.repeat(start * arrival.every_s, arrival.size)
    else:
        shape = 1.0 if isinstance(arrival, Poisson) else arrival.cv**-2
        come = 0.0
        while True:
            come += random.gammavariate(shape, 1 / shape)
            yield _time_of(come / arrival.rate_per_s, arrival.ramp_up_s)


def _time_of(seconds: float, ramp_up_s: float) -> float:
    """When as many have come as would have at the full rate in `seconds`."""
    return math.sqrt(2 * seconds * ramp_up_s) if seconds < ramp_up_s / 2 else seconds + ramp_up_s / 2
