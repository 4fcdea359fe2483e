"""The processes that share the layers of one base model, as one of them sees the others: sums and copies over all.

Every rank makes the same calls in the same order. Where a rank leaves in the middle, the others' calls raise
RanksPartedError, and all have to join anew. Knows no model.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import AllreduceOptions, ProcessGroup, ReduceOp, ReduceOptions


class RanksPartedError(RuntimeError):
    """Another rank left while this one waited for it. The reason is with the other."""


State = Literal["apart", "together", "alone"]


class Ranks:
    """`rank` of `size`; tensors that are shared lie on `device`.

    Layers are summed over all ranks inside `together`, where every rank runs the same. Inside `alone` one rank runs its
    part for its shapes, and the numbers mean nothing. Anywhere else to run a layer is a bug.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, connect: Callable[[int], "ProcessGroup | Any"]
    ) -> None:
        """`connect` joins the others for the n-th time."""
        self.rank, self.size, self.device = rank, size, device
        self.state: State = "apart"
        self._connect = connect
        self._group: ProcessGroup | Any | None = None

    def join(self, generation: int) -> None:
        """Waits until every rank has come. Raises RanksPartedError where one does not."""
        self.leave()
        with _parting():
            self._group = self._connect(generation)

    @property
    def can_part(self) -> bool:
        """Whether the others notice that one has left. On an accelerator they wait in its kernels."""
        return self.device.type == "cpu"

    def leave(self) -> None:
        """Whoever waits for this rank stops waiting."""
        self._group = None

    @contextmanager
    def together(self) -> Generator[None]:
        yield from self._as("together")

    @contextmanager
    def alone(self) -> Generator[None]:
        yield from self._as("alone")

    def _as(self, state: State) -> Generator[None]:
        earlier, self.state = self.state, state
        try:
            yield
        finally:
            self.state = earlier

    def sum_(self, x: Tensor) -> Tensor:
        """In place, the same on every rank to the last bit."""
        return self._reduce_all(x, ReduceOp.SUM)

    def max_(self, x: Tensor) -> Tensor:
        return self._reduce_all(x, ReduceOp.MAX)

    def sum_into_first(self, x: Tensor) -> None:
        """In place on rank 0; on the others `x` may be anything afterwards."""
        options = ReduceOptions()
        options.rootRank = 0
        with _parting():
            self._joined().reduce([x], options).wait()

    def from_first(self, x: Tensor) -> Tensor:
        """In place, what it is on rank 0."""
        with _parting():
            self._joined().broadcast(x, 0).wait()
        return x

    def gathered(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """x [rows, widths[rank]] of every rank side by side, [rows, the sum of widths]."""
        widest = max(widths)
        own = x if x.shape[1] == widest else nn.functional.pad(x, (0, widest - x.shape[1]))
        pieces = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in widths]
        with _parting():
            self._joined().allgather([pieces], [own.contiguous()]).wait()
        return torch.cat([piece[:, :width] for piece, width in zip(pieces, widths, strict=True)], 1)

    def _reduce_all(self, x: Tensor, operation: Any) -> Tensor:
        options = AllreduceOptions()
        options.reduceOp = operation
        with _parting():
            self._joined().allreduce([x], options).wait()
        return x

    def _joined(self) -> Any:
        assert self.state == "together", f"ranks that are {self.state} share nothing"
        if self._group is None:
            raise RanksPartedError("this rank has left the others")
        return self._group


@contextmanager
def _parting() -> Generator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RanksPartedError(str(error).splitlines()[0]) from error


def sum_block(block: nn.Module, ranks: Ranks) -> None:
    """From now on `block` gives the sum of what it computes on every rank, each with its part of the layers inside.

    Its input is the same on all of them. Whatever is in between is a function of that input on each rank, so in the
    backward the gradients for the input are summed (f and g of arXiv:1909.08053, around a whole block).
    """

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not torch.is_grad_enabled() or ranks.state == "alone":
            return args, kwargs
        if args:
            return (_Enter.apply(args[0], ranks), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _Enter.apply(kwargs["hidden_states"], ranks)}

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if ranks.state == "alone":
            return output
        return (_left(output[0], ranks), *output[1:]) if isinstance(output, tuple) else _left(output, ranks)

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(leave)


def _left(y: Tensor, ranks: Ranks) -> Tensor:
    return _Leave.apply(y, ranks) if torch.is_grad_enabled() else ranks.sum_(y.contiguous())


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.ranks.sum_(dy.clone(memory_format=torch.contiguous_format)), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum_(y.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dy, None
