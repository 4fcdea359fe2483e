"""A rank that fails where a test says: what a file holds, once, when its time has come. Started as a program.

`memory N` and `bug N`: the N-th sum from now on finds no memory, or raises; `die N`: the process is gone. `product N`:
the N-th product of a training pass finds no memory, between two sums.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

from lorry.actors.group import follower
from lorry.actors.model import lora
from lorry.actors.model.ranks import Ranks

_sum, _product = Ranks.sum_, lora.linear


class Faults:
    def __init__(self, file: Path) -> None:
        self._file, self._what, self._left = file, "", 0

    def due(self, *kinds: str) -> str | None:
        """What is to happen here and now, of these kinds."""
        if self._file.exists():
            self._what, n = self._file.read_text().split()
            self._left = int(n)
            self._file.unlink()
        if self._what not in kinds:
            return None
        self._left -= 1
        if self._left >= 0:
            return None
        what, self._what = self._what, ""
        return what


def plant(faults: Faults) -> None:
    def sum_(ranks: Ranks, x: Tensor) -> Tensor:
        what = faults.due("memory", "bug", "die")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what is not None:
            raise torch.OutOfMemoryError("CUDA out of memory") if what == "memory" else ValueError("a bug")
        return _sum(ranks, x)

    def product(*tensors: Tensor | None) -> Tensor:
        if faults.due("product"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _product(*tensors)  # pyright: ignore[reportArgumentType]

    Ranks.sum_, lora.linear = sum_, product


if __name__ == "__main__":
    plant(Faults(Path(sys.argv[1])))
    follower.main(sys.argv[2:])
