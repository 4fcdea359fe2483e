"""How the ranks of one machine find each other for what tensors they share: gloo on CPUs, NCCL on CUDA."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ..model.ranks import Ranks

_FOR_EVER = timedelta(days=365)
"""Who is dead is known otherwise; who is slow is waited for."""


def ranks_of(meeting: Path, rank: int, size: int, device: str) -> Ranks:
    """`meeting` is a file that all of them may write to. `device` cuda:1 is the first rank's, the others' follow."""
    own = device_of(device, rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    # Nothing leaves the machine.
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo0" if sys.platform == "darwin" else "lo")
    return Ranks(rank, size, own, _connector(meeting, rank, size, own))


def device_of(device: str, rank: int) -> torch.device:
    first = torch.device(device)
    return first if first.type == "cpu" else torch.device(first.type, (first.index or 0) + rank)


def _connector(meeting: Path, rank: int, size: int, device: torch.device) -> Callable[[int], Any]:
    torch_has: Any = distributed
    make = torch_has.ProcessGroupNCCL if device.type == "cuda" else torch_has.ProcessGroupGloo
    store = torch_has.FileStore(str(meeting), size)
    # Not the one group that a process has by default: that cannot be left and joined anew while something waits.
    return lambda generation: make(torch_has.PrefixStore(str(generation), store), rank, size, _FOR_EVER)
