"""The built-in losses: from target logprobs to each token's loss and its derivative. Pure: torch in, torch out.

Every loss is a sum of terms of one token each, so any slice of tokens can be evaluated on its own. What such a term
needs to know of its sequence is found beforehand, by `sequence_ratios`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ...wire.commands import LOSSES


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What the client sent beside the targets, [targets] float32 each. `weights` multiplies the token's term.

    cross_entropy reads `weights` alone; the policy losses read the sampler's `logprobs` and `advantages` too, and gspo
    what `sequence_ratios` made of the whole sequence.
    """

    weights: Tensor
    logprobs: Tensor
    advantages: Tensor
    sequence_ratios: Tensor | None = None

    def slice(self, start: int, end: int) -> "LossInputs":
        ratios = None if self.sequence_ratios is None else self.sequence_ratios[start:end]
        return LossInputs(self.weights[start:end], self.logprobs[start:end], self.advantages[start:end], ratios)


Terms: TypeAlias = tuple[Tensor, Tensor]
_Loss: TypeAlias = Callable[[Tensor, LossInputs, Mapping[str, float]], Terms]


def evaluate(loss_fn: str, config: Mapping[str, float], logprobs: Tensor, inputs: LossInputs) -> Terms:
    """Each token's loss and d loss / d logprob, [targets] float32, for the model's `logprobs` [targets] float32.

    Formulas: tinker-docs.thinkingmachines.ai/tinker/losses; what `config` leaves out comes from `wire.commands`.
    """
    loss, grad = _LOSSES[loss_fn](logprobs, inputs, LOSSES[loss_fn].config | dict(config))
    weights, masked = inputs.weights, inputs.weights == 0  # a ratio that overflows at a masked token is nobody's loss
    return (loss * weights).masked_fill_(masked, 0.0), (grad * weights).masked_fill_(masked, 0.0)


def sequence_ratios(p: Tensor, q: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """Each token's sequence's geometric mean of exp(p - q) over the tokens whose `mask` is not 0; 1 where none is.

    p, q, mask [targets] float32, of sequences of `lengths` [sequences] int64 laid end to end -> [targets] float32.
    """
    sequence = torch.arange(len(lengths), device=p.device).repeat_interleave(lengths)  # [targets]
    counted = mask != 0
    gaps = torch.where(counted, p - q, 0.0)
    totals = torch.zeros(len(lengths), device=p.device).index_add_(0, sequence, gaps)  # [sequences]
    counts = torch.zeros_like(totals).index_add_(0, sequence, counted.to(totals.dtype))
    return (totals / counts.clamp_(min=1)).exp_()[sequence]


def _cross_entropy(p: Tensor, inputs: LossInputs, config: Mapping[str, float]) -> Terms:
    """-p"""
    return -p, torch.full_like(p, -1.0)


def _importance_sampling(p: Tensor, inputs: LossInputs, config: Mapping[str, float]) -> Terms:
    """-exp(p - q) * A"""
    loss = -torch.exp(p - inputs.logprobs) * inputs.advantages
    return loss, loss


def _ppo(p: Tensor, inputs: LossInputs, config: Mapping[str, float]) -> Terms:
    """-min(r * A, clip(r, low, high) * A) with r = exp(p - q); no gradient where the clipped side is the smaller."""
    return _clipped(torch.exp(p - inputs.logprobs), inputs.advantages, config)


def _gspo(p: Tensor, inputs: LossInputs, config: Mapping[str, float]) -> Terms:
    """PPO's, with r the sequence's ratio in value and the token's own in gradient (GSPO-token, arXiv:2507.18071)."""
    assert inputs.sequence_ratios is not None, "gspo is evaluated after sequence_ratios"
    return _clipped(inputs.sequence_ratios, inputs.advantages, config)


def _clipped(ratio: Tensor, advantages: Tensor, config: Mapping[str, float]) -> Terms:
    """For a ratio whose derivative by p is itself."""
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    free, bound = ratio * advantages, clipped * advantages
    inside = clipped == ratio
    return -torch.minimum(free, bound), torch.where(inside | (free < bound), -free, 0.0)


def _cispo(p: Tensor, inputs: LossInputs, config: Mapping[str, float]) -> Terms:
    """-stop_gradient(clip(r, low, high)) * p * A"""
    ratio = torch.exp(p - inputs.logprobs)
    grad = -ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"]) * inputs.advantages
    return grad * p, grad


def _dro(p: Tensor, inputs: LossInputs, config: Mapping[str, float]) -> Terms:
    """-(p * A - beta / 2 * (p - q)^2)"""
    gap, beta = p - inputs.logprobs, config["beta"]
    return beta / 2 * gap.square() - p * inputs.advantages, beta * gap - inputs.advantages


_LOSSES: dict[str, _Loss] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
    "gspo": _gspo,
}
