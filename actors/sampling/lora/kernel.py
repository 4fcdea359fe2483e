"""The kernel of `native`, in C++: built once on a machine, and loaded by every actor after that.

Whoever builds it does so in a folder of its own, and what came of it gets its name when it is whole, so that a process
that is killed meanwhile leaves nothing that another would wait for or load.
"""

import functools
import hashlib
import os
import platform
import shlex
import stat
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
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
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        why = next(iter(str(error).strip().splitlines()), repr(error))
        log.warning("the kernel for LoRA cannot be built; sampling goes on without, and is slower", why=why)
        return False
    return True


@functools.cache
def load_kernel() -> None:
    """Once in a process. Takes milliseconds where it has been built on this machine, else some seven seconds. Raises
    what it finds where it cannot be built: RuntimeError, OSError, ImportError or SubprocessError."""
    folder = _own_folder()
    kept = None if folder is None else folder / f"{_fingerprint()}.so"
    if kept is not None and _load(kept):
        return
    with TemporaryDirectory(prefix="lorry-kernel-") as temporary:
        library = _build(Path(temporary))
        if kept is not None:
            _keep(library, kept)


def kernel() -> Any:
    """The operator, after `load_kernel`."""
    return cast(Any, torch.ops.lorry_cpu).add_lora


def _own_folder() -> Path | None:
    """Where this user keeps kernels; None where others could put one there, or nobody can."""
    try:
        folder = user_cache_path("lorry") / "kernels"
        if not folder.is_absolute():
            return None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        return folder if all(_is_ours(path) for path in (folder, *folder.parents)) else None
    except (OSError, RuntimeError):  # the latter where there is no home
        return None


def _is_ours(path: Path) -> bool:
    """Nobody but this user and root can change what is there, or in a sticky folder what is not theirs."""
    found = path.lstat()
    is_shared = found.st_mode & 0o022 and not (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX)
    return found.st_uid in (os.getuid(), 0) and not is_shared


def _fingerprint() -> str:
    """Of all that a kernel depends on: its source, how it is built, by what, for which torch and which processor."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
    compiler = subprocess.run(command, capture_output=True, check=False).stdout
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


def _load(library: Path) -> bool:
    try:
        if not _is_ours(library):
            return False
        torch.ops.load_library(library)
    except OSError:  # nobody has built it, or what is there is no library, or none that may be loaded from there
        return False
    return True


def _keep(library: Path, place: Path) -> None:
    """Whole, or not at all, whenever the machine stops. Where there is no room for it, it is built again."""
    try:
        with NamedTemporaryFile(dir=place.parent, prefix="new-", delete=False) as copy:
            copy.write(library.read_bytes())
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(copy.name, place)
    except OSError as error:
        log.warning("the kernel for LoRA is not kept; the next actor builds it again", why=str(error))


@contextmanager
def _ninja() -> Generator[None]:
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, path))
    try:
        yield
    finally:
        os.environ["PATH"] = path
