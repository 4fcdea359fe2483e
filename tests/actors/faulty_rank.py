"""A rank that fails where a test says: what a file holds, once, when its time has come. Started as a program.

`memory N` and `bug N`: the N-th sum from now on finds no memory, or raises; `die N`: the process is gone.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

from lorry.actors.group import follower
from lorry.actors.model.ranks import Ranks

_sum = Ranks.sum_


def failing(fault: Path) -> None:
    left = [0, ""]

    def sum_(ranks: Ranks, x: Tensor) -> Tensor:
        if fault.exists():
            what, n = fault.read_text().split()
            fault.unlink()
            left[:] = int(n), what
        if left[1]:
            left[0] = int(left[0]) - 1
            if left[0] < 0:
                what, left[1] = left[1], ""
                if what == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise torch.OutOfMemoryError("CUDA out of memory") if what == "memory" else ValueError("a bug")
        return _sum(ranks, x)

    Ranks.sum_ = sum_


if __name__ == "__main__":
    failing(Path(sys.argv[1]))
    follower.main(sys.argv[2:])
