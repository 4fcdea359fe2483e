"""Host and device memory: whether an exception says that it ran out, and giving back what the allocator keeps."""

import ctypes
import os
import platform
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...wire.errors import OutOfMemoryError


def memory_ran_out(error: BaseException) -> bool:
    """On CUDA by its type; the CPU's allocator raises a bare RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def free_on(device: torch.device) -> int:
    """Bytes that tensors may still take of an accelerator, those among them that the allocator keeps."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def held_on(device: torch.device) -> int:
    """Bytes that this process holds: of an accelerator, its tensors'; else, of the machine, all of its own. 0 where the
    system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@contextmanager
def told_as_ours(what: str, field: str) -> Generator[None]:
    """Raises OutOfMemoryError where memory runs out inside: `what` does not fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory_ran_out(error):
            raise
        raise OutOfMemoryError(f"{what} does not fit into the actor's memory", field=field) from error


def give_back_freed() -> None:
    """Host memory that is free again goes back to the system: glibc keeps it otherwise, for up to 32 MiB a block."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


def device_id(device: torch.device) -> str:
    """The same for whoever uses this device of this machine, under whatever number it is visible to them."""
    if device.type != "cuda":
        return f"{platform.node()}/{device.type}"
    return f"{platform.node()}/{torch.cuda.get_device_properties(device).uuid}"
