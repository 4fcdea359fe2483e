"""The kernel of `native`, in C++: built once on a machine, and loaded by every actor after that.

Whoever builds it does so in a folder of its own and moves what came of it to its name, so that a process that is killed
while it builds leaves nothing that another would wait for or load.
"""

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import ninja
import structlog
import torch
from platformdirs import user_cache_path

from ...model.base_model import BaseModel

log = structlog.get_logger("lorry.actor")

_SOURCE = Path(__file__).parent / "lora_rows.cpp"
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
"""Sums may be taken in any order, as a BLAS does; NaN and infinity count as they are."""


def has_kernel(base: BaseModel) -> bool:
    """Whether the kernel is here for adapters of this model: on the CPU in float32, wherever a compiler is found."""
    if base.division is not None or base.device.type != "cpu" or base.dtype != torch.float32:
        return False
    try:
        load_kernel()
    except (RuntimeError, OSError) as error:
        why = str(error).strip().splitlines()[0]
        log.warning("the kernel for LoRA cannot be built; sampling goes on without, and is slower", why=why)
        return False
    return True


@functools.cache
def load_kernel() -> None:
    """Once in a process. Takes milliseconds where it has been built on this machine, else some seven seconds. Raises
    RuntimeError or OSError where it cannot be built."""
    folder = _own_folder()
    if folder is None:
        with TemporaryDirectory(prefix="lorry-kernel-") as temporary:
            _build(Path(temporary))
        return
    built = folder / f"{_fingerprint()}.so"
    try:
        torch.ops.load_library(built)
    except OSError:  # nobody has built it, or what is there is no library
        with TemporaryDirectory(prefix="building-", dir=folder) as temporary:
            _put(_build(Path(temporary)), built)


def kernel() -> Any:
    """The operator, after `load_kernel`."""
    return cast(Any, torch.ops.lorry_cpu).add_lora


def _own_folder() -> Path | None:
    """Where this user keeps kernels; None where others could put one there, or nobody can."""
    folder = user_cache_path("lorry") / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return None
    is_own = found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if is_own and os.access(folder, os.W_OK) else None


def _fingerprint() -> str:
    """Of all that a kernel depends on: its source, how it is built, by what, for which torch and which processor."""
    compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, check=False).stdout
    told = (_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), compiler, torch.__version__.encode(), _processor())
    return hashlib.sha256(b"\0".join(told)).hexdigest()


def _processor() -> bytes:
    """What `-march=native` looks at: a home folder may be that of several machines."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()} {platform.version()}".encode()
    first, _, _ = info.read_bytes().partition(b"\n\n")
    return b"\n".join(line for line in first.splitlines() if line.startswith((b"model", b"flags", b"Features")))


def _build(folder: Path) -> Path:
    """It is loaded, too."""
    from torch.utils.cpp_extension import load

    with _ninja():
        load("lorry_cpu", [str(_SOURCE)], extra_cflags=_FLAGS, build_directory=str(folder), is_python_module=False)
    return folder / "lorry_cpu.so"


def _put(library: Path, place: Path) -> None:
    """Whole, or not at all, whenever the machine stops."""
    with library.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(library, place)


@contextmanager
def _ninja() -> Generator[None]:
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, path))
    try:
        yield
    finally:
        os.environ["PATH"] = path
