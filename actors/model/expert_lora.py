"""What adapters add to the two products of routed experts, forward and backward, all in place.

A factor that an adapter has once for all experts is used once for each token, the others for each pair of a token and
an expert. `products` yields the experts in order, each as soon as the base's product is in what is to be added to.

Shapes: hidden, y and their gradients [tokens, hidden]; rows, output and theirs [pairs, hidden]; gate_up [pairs, outputs
of gate and up]; inner [pairs, inputs of down]; downs x A.T, [pairs, the greatest rank], zero beyond an adapter's own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from .adapter import Part, accumulate
from .routing import Routing

_UNREAD = torch.empty(0)


class Share:
    """One adapter's part of a weight. Its factors are there for each expert, or for all in the first place.

    `often` says that most experts will be asked for: to take factors apart at once costs less then than to select.
    """

    def __init__(self, part: Part, often: bool) -> None:
        self.part, self.scale, self.rank, self._often = part, part.scale, part.a.shape[1], often
        self.has_common_a, self.has_common_b = len(part.a) == 1, len(part.b) == 1
        self._unbound: dict[str, tuple[Tensor, ...]] = {}

    def of(self, name: str, expert: int) -> Tensor:
        """`a`, `b_t`, `grad_a` and so on of one expert."""
        if (factors := self._unbound.get(name)) is None:
            factor: Tensor | None = getattr(self.part, name)
            assert factor is not None, "a sampler's adapter has no gradients"
            if not self._often:
                return factor[expert if len(factor) > 1 else 0]
            factors = self._unbound[name] = factor.unbind(0)
        return factors[expert if len(factors) > 1 else 0]


@dataclass(frozen=True, slots=True)
class Shares:
    """Of one weight: tokens `spans[i]` go through `each[i]`, in order."""

    routing: Routing
    spans: Sequence[tuple[int, int]]
    each: Sequence[Share]

    @property
    def width(self) -> int:
        return max(share.rank for share in self.each)

    @property
    def has_own_a(self) -> bool:
        """Whether some A is one expert's alone."""
        return not all(share.has_common_a for share in self.each)

    @property
    def has_own_b(self) -> bool:
        return not all(share.has_common_b for share in self.each)

    def segments(self) -> Iterator[tuple[slice, Share]]:
        """Of tokens."""
        for (start, end), share in zip(self.spans, self.each, strict=True):
            yield slice(start, end), share

    def stretches(
        self, products: Iterable[int], *pairs: Tensor | None
    ) -> Iterator[tuple[int, Share, tuple[Tensor, ...]]]:
        """Each stretch of an adapter's: the expert, and its own of every tensor; of None, something not to be read."""
        split = [repeat(_UNREAD) if tensor is None else iter(self.routing.split(tensor)) for tensor in pairs]
        for expert in products:
            for stretch in self.routing.stretches[expert]:
                pieces = tuple(map(next, split))
                if stretch.segment is not None:
                    yield expert, self.each[stretch.segment], pieces


def add_gate_up(shares: Shares, products: Iterable[int], hidden: Tensor, rows: Tensor, gate_up: Tensor) -> Tensor:
    """Adds to `gate_up` and returns downs."""
    common = hidden.new_zeros(len(hidden), shares.width)
    for tokens, share in shares.segments():
        if share.has_common_a:
            torch.mm(hidden[tokens], share.of("a_t", 0), out=common[tokens, : share.rank])
    downs = shares.routing.gather(common)
    for expert, share, (down, row, y) in shares.stretches(products, downs, rows if shares.has_own_a else None, gate_up):
        own = down.narrow(1, 0, share.rank)
        if not share.has_common_a:
            torch.mm(row, share.of("a_t", expert), out=own)
        y.addmm_(own, share.of("b", expert), alpha=share.scale)
    return downs


def add_gate_up_backward(
    shares: Shares, products: Iterable[int], hidden: Tensor, downs: Tensor, d_gate_up: Tensor, d_rows: Tensor
) -> Tensor:
    """Adds to `d_rows` and the adapters' gradients. Returns what `add_common_gate_up_backward` wants."""
    d_downs = torch.zeros_like(downs)
    rows, dx_rows = (shares.routing.gather(hidden), d_rows) if shares.has_own_a else (None, None)
    pieces = shares.stretches(products, downs, rows, d_gate_up, d_downs, dx_rows)
    for expert, share, (down, row, dy, d_down, dx) in pieces:
        own = torch.mm(dy, share.of("b_t", expert), out=d_down.narrow(1, 0, share.rank))  # [stretch, rank]
        accumulate(share.of("grad_b", expert), down.narrow(1, 0, share.rank), dy, share.scale)
        if not share.has_common_a:
            accumulate(share.of("grad_a", expert), own, row, share.scale)
            dx.addmm_(own, share.of("a", expert), alpha=share.scale)
    return d_downs


def add_common_gate_up_backward(shares: Shares, hidden: Tensor, d_downs: Tensor, d_hidden: Tensor) -> None:
    """Adds to `d_hidden` and the adapters' gradients, once for each token."""
    summed = shares.routing.sum(d_downs)
    for tokens, share in shares.segments():
        if share.has_common_a:
            d_down = summed[tokens, : share.rank]
            accumulate(share.of("grad_a", 0), d_down, hidden[tokens], share.scale)
            d_hidden[tokens].addmm_(d_down, share.of("a", 0), alpha=share.scale)


def add_down(shares: Shares, products: Iterable[int], inner: Tensor, output: Tensor) -> Tensor:
    """Adds to `output`, which counts nothing yet, and returns downs."""
    downs = inner.new_zeros(len(inner), shares.width)
    for expert, share, (x, down, y) in shares.stretches(products, inner, downs, output if shares.has_own_b else None):
        own = torch.mm(x, share.of("a_t", expert), out=down.narrow(1, 0, share.rank))  # [stretch, rank]
        if not share.has_common_b:
            y.addmm_(own, share.of("b", expert), alpha=share.scale)
    return downs


def add_common_down(shares: Shares, downs: Tensor, counted: Tensor, y: Tensor) -> None:
    """Adds to `y`, once for each token; counted [tokens, choices]."""
    summed = shares.routing.sum(downs, counted)
    for tokens, share in shares.segments():
        if share.has_common_b:
            y[tokens].addmm_(summed[tokens, : share.rank], share.of("b", 0), alpha=share.scale)


def add_down_backward(
    shares: Shares,
    products: Iterable[int],
    inner: Tensor,
    counted: Tensor,
    downs: Tensor,
    dy: Tensor,
    d_output: Tensor,
    d_inner: Tensor,
) -> None:
    """`d_output` and `d_inner` are of an output that counts once; counted [pairs, 1], what it counts in its sum."""
    common = dy.new_zeros(len(dy), shares.width)
    counted_inner, counted_downs = inner * counted, downs * counted
    summed = shares.routing.sum(counted_downs)
    for tokens, share in shares.segments():
        if share.has_common_b:
            torch.mm(dy[tokens], share.of("b_t", 0), out=common[tokens, : share.rank])
            accumulate(share.of("grad_b", 0), summed[tokens, : share.rank], dy[tokens], share.scale)
    d_downs = shares.routing.gather(common)
    downs_read, dy_read = (counted_downs, d_output) if shares.has_own_b else (None, None)
    pieces = shares.stretches(products, counted_inner, downs_read, dy_read, d_downs, d_inner)
    for expert, share, (x, down, dy_piece, d_down, dx) in pieces:
        own = d_down.narrow(1, 0, share.rank)
        if not share.has_common_b:
            torch.mm(dy_piece, share.of("b_t", expert), out=own)
            accumulate(share.of("grad_b", expert), down.narrow(1, 0, share.rank), dy_piece, share.scale)
        accumulate(share.of("grad_a", expert), own, x, share.scale)
        dx.addmm_(own, share.of("a", expert), alpha=share.scale)
