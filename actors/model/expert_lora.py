"""What adapters add to the two products of routed experts, forward and backward, all in place.

A factor that an adapter has once for all experts is used once for each token, the others for each pair of a token and
an expert. Shapes: hidden, y and their gradients [tokens, hidden]; rows, output and theirs [pairs, hidden]; gate_up
[pairs, outputs of gate and up]; inner [pairs, inputs of down]; counted [pairs, 1], what a pair counts in its token's
sum; downs x A.T, [pairs, the greatest rank], zero beyond an adapter's own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Part, accumulate
from .routing import Routing


@dataclass(frozen=True, slots=True)
class Shares:
    """Of one weight: tokens `spans[i]` go through `parts[i]`, or None, the bare base."""

    routing: Routing
    spans: Sequence[tuple[int, int]]
    parts: Sequence[Part | None]

    @property
    def width(self) -> int:
        return max((part.a.shape[-2] for part in self.parts if part is not None), default=0)

    def segments(self) -> Iterator[tuple[slice, Part]]:
        """Of tokens."""
        for (start, end), part in zip(self.spans, self.parts, strict=True):
            if part is not None:
                yield slice(start, end), part

    def stretches(self) -> Iterator[tuple[slice, int, Part]]:
        """Of pairs, with their expert."""
        for stretch in self.routing.stretches:
            if (part := self.parts[stretch.segment]) is not None:
                yield slice(stretch.start, stretch.end), stretch.expert, part


def add_gate_up(shares: Shares, hidden: Tensor, rows: Tensor, gate_up: Tensor) -> Tensor | None:
    """Adds to `gate_up` and returns downs, None where no adapter has any."""
    if not shares.width:
        return None
    common = hidden.new_zeros(len(hidden), shares.width)
    for tokens, part in shares.segments():
        if _is_common(part.a):
            common[tokens, : part.a.shape[1]] = torch.mm(hidden[tokens], part.a_t[0])
    downs = common[shares.routing.tokens]
    for pairs, expert, part in shares.stretches():
        down = downs[pairs, : part.a.shape[1]]
        if not _is_common(part.a):
            down.copy_(torch.mm(rows[pairs], part.a_t[expert]))
        gate_up[pairs].addmm_(down, _of(part.b, expert), alpha=part.scale)
    return downs


def add_gate_up_backward(
    shares: Shares, hidden: Tensor, downs: Tensor | None, d_gate_up: Tensor, d_rows: Tensor
) -> Tensor | None:
    """Adds to `d_rows` and the adapters' gradients. Returns what `add_common_gate_up_backward` wants."""
    if downs is None:
        return None
    rows, d_downs = hidden[shares.routing.tokens], torch.zeros_like(downs)
    for pairs, expert, part in shares.stretches():
        assert part.grad_a is not None and part.grad_b is not None, "a sampler's adapter has no gradients"
        rank = part.a.shape[1]
        d_down = torch.mm(d_gate_up[pairs], _of(part.b_t, expert))  # [stretch, rank]
        accumulate(_of(part.grad_b, expert), downs[pairs, :rank], d_gate_up[pairs], part.scale)
        if _is_common(part.a):
            d_downs[pairs, :rank] = d_down
        else:
            accumulate(part.grad_a[expert], d_down, rows[pairs], part.scale)
            d_rows[pairs].addmm_(d_down, part.a[expert], alpha=part.scale)
    return d_downs


def add_common_gate_up_backward(shares: Shares, hidden: Tensor, d_downs: Tensor | None, d_hidden: Tensor) -> None:
    """Adds to `d_hidden` and the adapters' gradients, once for each token."""
    if d_downs is None:
        return
    summed = shares.routing.sum(d_downs)
    for tokens, part in shares.segments():
        if _is_common(part.a):
            assert part.grad_a is not None
            d_down = summed[tokens, : part.a.shape[1]]
            accumulate(part.grad_a[0], d_down, hidden[tokens], part.scale)
            d_hidden[tokens].addmm_(d_down, part.a[0], alpha=part.scale)


def add_down(shares: Shares, inner: Tensor, output: Tensor) -> Tensor | None:
    """Adds to `output`, which counts nothing yet, and returns downs, None where no adapter has any."""
    if not shares.width:
        return None
    downs = inner.new_zeros(len(inner), shares.width)
    for pairs, expert, part in shares.stretches():
        down = torch.mm(inner[pairs], _of(part.a_t, expert))  # [stretch, rank]
        downs[pairs, : part.a.shape[1]] = down
        if not _is_common(part.b):
            output[pairs].addmm_(down, part.b[expert], alpha=part.scale)
    return downs


def add_common_down(shares: Shares, downs: Tensor | None, counted: Tensor, y: Tensor) -> None:
    """Adds to `y`, once for each token."""
    if downs is None:
        return
    summed = shares.routing.sum(downs * counted).to(y.dtype)
    for tokens, part in shares.segments():
        if _is_common(part.b):
            y[tokens].addmm_(summed[tokens, : part.a.shape[1]], part.b[0], alpha=part.scale)


def add_down_backward(
    shares: Shares,
    inner: Tensor,
    counted: Tensor,
    downs: Tensor | None,
    dy: Tensor,
    d_output: Tensor,
    d_inner: Tensor,
) -> None:
    """`d_output` and `d_inner` are of an output that counts once."""
    if downs is None:
        return
    d_common = dy.new_zeros(len(dy), shares.width)
    counted_inner, counted_downs = (x.mul(counted).to(x.dtype) for x in (inner, downs))
    summed = shares.routing.sum(counted_downs)
    for tokens, part in shares.segments():
        if _is_common(part.b):
            assert part.grad_b is not None, "a sampler's adapter has no gradients"
            rank = part.a.shape[1]
            d_common[tokens, :rank] = torch.mm(dy[tokens], part.b_t[0])
            accumulate(part.grad_b[0], summed[tokens, :rank], dy[tokens], part.scale)
    d_downs = d_common[shares.routing.tokens]
    for pairs, expert, part in shares.stretches():
        assert part.grad_a is not None and part.grad_b is not None
        d_down = d_downs[pairs, : part.a.shape[1]]
        if not _is_common(part.b):
            d_down = torch.mm(d_output[pairs], part.b_t[expert])
            accumulate(part.grad_b[expert], counted_downs[pairs, : part.a.shape[1]], d_output[pairs], part.scale)
        accumulate(_of(part.grad_a, expert), d_down, counted_inner[pairs], part.scale)
        d_inner[pairs].addmm_(d_down, _of(part.a, expert), alpha=part.scale)


def _is_common(factor: Tensor) -> bool:
    return len(factor) == 1


def _of(factor: Tensor, expert: int) -> Tensor:
    return factor[0 if _is_common(factor) else expert]
