"""What a process imports, it keeps: Python's collector of cycles need not look at it, while it comes or ever after."""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Generator[None]:
    """Of torch and transformers come a million objects. While they come, the collector would walk all that are there
    some dozens of times, and again in each full collection beside the work, and at the end."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
