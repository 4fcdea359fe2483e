"""The output head of a base model that several devices share: each has some of the vocabulary.

log-softmax takes one maximum and two sums over the ranks; no logits are gathered (arXiv:1909.08053, section 3).
"""

import torch
from torch import Tensor

from ..model.lora import LoraLinear, LoraTargets
from ..model.ranks import Ranks
from .logprobs import Chunk, OutputHead, Places


class DividedHead(OutputHead):
    def __init__(self, head: LoraLinear, targets: LoraTargets, chunk_bytes: int, ranks: Ranks) -> None:
        super().__init__(head, targets, chunk_bytes)
        shard = next(target.shard for target in targets.modules if target.index == head.index)
        assert shard is not None
        self._first, self._last, self._ranks = shard.start, shard.end, ranks

    def _normalise_(self, logits: Tensor, places: Places) -> Tensor:
        rows, tokens = places
        is_own, own = self._own(tokens)
        found = torch.where(is_own, logits[rows, own], 0.0)
        peaks = self._ranks.max_(logits.amax(-1))  # [chunk]
        sums = logits.sub_(peaks.unsqueeze(1)).exp_().sum(-1)
        logits.div_(self._ranks.sum_(sums).unsqueeze(1))
        return self._ranks.sum_(found) - (peaks + sums.log())[rows]

    def _add_at_(self, d_logits: Tensor, places: Places, grads: Tensor) -> None:
        is_own, own = self._own(places[1])
        d_logits.index_put_((places[0], own), torch.where(is_own, grads, 0.0), accumulate=True)

    def _backward(self, chunk: Chunk, places: Places, grads: Tensor, d_x: Tensor) -> None:
        super()._backward(chunk, places, grads, d_x)
        self._ranks.sum_(d_x)

    def _own(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Whether this rank has each of them, and their places among its own; any where it has not."""
        is_own = (tokens >= self._first) & (tokens < self._last)
        return is_own, torch.where(is_own, tokens - self._first, 0)
