"""Whether an exception says that memory ran out. It frees none."""

import torch


def memory_ran_out(error: BaseException) -> bool:
    """On CUDA by its type; the CPU's allocator raises a bare RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
