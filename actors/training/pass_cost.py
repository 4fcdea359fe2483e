"""What a training pass holds of its rows, found out by metering small ones."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..model.adapter import Adapter
from ..model.attention import SCORES_OF_A_BLOCK
from ..model.base_model import BaseModel
from ..model.in_flight import Segment
from ..model.lora import LoraTargets
from ..model.metering import Meter
from ..model.recomputing import Bytes, PassCost
from ..model.spec import AdapterSpec

_LENGTHS = (32, 96, 160)
"""In tokens, of rows in passes of their own: what there is once is not in their differences."""
_RANK = 8
_BESIDE = 0.5
"""Of what a layer holds, what its backward has beside it: more than was seen."""
_MANY_NUMBERS = 128
"""Of hidden size, for each token in a layer: more than any model here was seen to hold."""


def measure_pass(base: BaseModel, targets: LoraTargets) -> PassCost:
    """With an adapter on all that is trained, and without the output head, which has a bound of its own."""
    segment = Segment(adapter_on_all(base, targets, _RANK), 0, 0)
    cost = PassCost(base.layers, *_fit(base, segment, 0), *_fit(base, segment, base.layers))
    ranks = 1 if base.division is None else base.division.ranks.size
    heads = base.model.config.get_text_config().num_attention_heads // ranks
    return cost if cost.held.square else _in_blocks(cost, heads)


def adapter_on_all(base: BaseModel, targets: LoraTargets, rank: int) -> Adapter:
    """That the model lets one train."""
    groups = {target.group for target in targets.modules}
    spec = AdapterSpec(
        rank, seed=0, train_mlp="mlp" in groups, train_attn="attn" in groups, train_unembed="unembed" in groups
    )
    return targets.new_adapter(spec, base.device)


def _in_blocks(cost: PassCost, heads: int) -> PassCost:
    """Where scores are had and not kept, there are no more of them than a block's, and a long row's pass holds most at
    another moment than the short ones' that were metered."""
    if not (cost.most.square or cost.most_again.square):
        return cost
    block = max(cost.most.square, cost.most_again.square) / heads * SCORES_OF_A_BLOCK
    layer = (cost.held.token - cost.held_again.token) / cost.layers
    most = Bytes(cost.held.token + _BESIDE * layer, cost.most.square, block)
    again = Bytes(cost.held_again.token + (1 + _BESIDE) * layer, cost.most_again.square, block)
    return replace(cost, most=most, most_again=again)


class Thrift:
    """How many layers of a pass are to be computed again, where it may hold as much as `available` says each time."""

    def __init__(self, base: BaseModel, targets: LoraTargets, available: Callable[[], int]) -> None:
        self._base, self._targets, self._available = base, targets, available
        self._cost: PassCost | None = None

    def layers_again(self, lengths: Sequence[int]) -> int:
        """Of rows of so many tokens. The first pass that might be too large takes as long as some small ones more."""
        available = self._available()
        if self._far_below(lengths, available):
            return 0
        if self._cost is None:
            self._cost = measure_pass(self._base, self._targets)
        return self._cost.layers_again(lengths, available)

    def _far_below(self, lengths: Sequence[int], available: int) -> bool:
        config = self._base.model.config.get_text_config()
        numbers = _MANY_NUMBERS * config.hidden_size * sum(lengths)
        scores = config.num_attention_heads * sum(n * n for n in lengths)
        return 4 * self._base.layers * (numbers + 4 * scores) < available


def _fit(base: BaseModel, segment: Segment, again: int) -> tuple[Bytes, Bytes]:
    """What is held after the forward, and at most."""
    found = [meter_pass(base, segment, again, length) for length in _LENGTHS]
    return _growth([held for held, _ in found]), _growth([most for _, most in found])


def _growth(found: list[int]) -> Bytes:
    """Of a polynomial of the second degree through what was found at the lengths, which are equally far apart."""
    a, b, c = _LENGTHS
    square = (found[2] - 2 * found[1] + found[0]) / (2 * (b - a) ** 2)
    return Bytes((found[2] - found[0]) / (c - a) - square * (a + c), square)


def meter_pass(base: BaseModel, segment: Segment, again: int, tokens: int) -> tuple[int, int]:
    """Bytes that one row's pass holds after its forward, and at most, with the segment's adapter."""
    in_flight, pause, layers = base.in_flight, base.in_flight.on_pause, base.in_flight.layers
    in_flight.lengths, in_flight.again, in_flight.on_pause = [tokens], again, lambda: None
    in_flight.layers = None  # compiled they hold no more, and a meter cannot look into them
    in_flight.segments = [Segment(segment.adapter, 0, tokens)]
    places = torch.arange(tokens, device=base.device)
    try:
        with base.alone(), Meter() as meter:
            hidden = base.hidden_states(places % base.vocab_size, places, grad=True)  # which choose many experts
            held = meter.live
            hidden.backward(torch.ones_like(hidden))
    finally:
        in_flight.lengths, in_flight.segments, in_flight.again = [], [], 0
        in_flight.on_pause, in_flight.layers = pause, layers
    return held, meter.peak
