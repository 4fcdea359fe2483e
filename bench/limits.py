"""What a machine can do at most: the rate of one large product, and the rate at which memory is copied."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorry.actors.model.products import linear


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the device: operations and bytes a second."""

    operations_per_s: float
    bytes_per_s: float

    def __str__(self) -> str:
        return f"{self.operations_per_s / 1e12:.2f} TFLOP/s and {self.bytes_per_s / 1e9:.1f} GB/s"


def limits_of(device: torch.device, dtype: torch.dtype, repetitions: int = 7) -> Limits:
    """Measured by a product of square matrices and by a copy that no cache holds, with torch's threads."""
    n, size = (8192, 2**30) if device.type != "cpu" else (1024, 2**27)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return Limits(
        2 * n**3 / seconds(lambda: product(a, b), device, repetitions),
        2 * size / seconds(lambda: target.copy_(source), device, repetitions),
    )


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As the engine makes it: on a CPU not by what torch takes of itself, where another is faster."""
    return torch.mm(a, b) if a.device.type != "cpu" else linear(a, b)


def seconds(run: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """The median, after two that warm up."""
    times: list[float] = []
    for repetition in range(repetitions + 2):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times += [time.perf_counter() - started] if repetition > 1 else []
    return statistics.median(times)


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
