"""The kernel in C++ is built once on a machine, whatever becomes of those who build it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from lorry.actors.model.base_model import wrap_model
from lorry.actors.sampling.lora import kernel

from .models import tiny_qwen3

LOAD = """
import sys, torch
from torch.utils import cpp_extension
from lorry.actors.sampling.lora import kernel
build = cpp_extension._write_ninja_file_and_build_library
cpp_extension._write_ninja_file_and_build_library = lambda *a, **o: (print("builds", flush=True), build(*a, **o))
kernel.load_kernel()
print(torch.ops.lorry_cpu.add_lora, flush=True)
"""


def _start(cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "HOME": str(cache)}
    return subprocess.Popen([sys.executable, "-c", LOAD], env=environment, stdout=subprocess.PIPE, text=True)


def _load(cache: Path) -> list[str]:
    return _start(cache).communicate()[0].splitlines()


def test_a_kernel_is_built_once_and_whoever_is_killed_meanwhile_is_in_nobodys_way(tmp_path: Path) -> None:
    killed = _start(tmp_path)
    assert killed.stdout is not None and killed.stdout.readline() == "builds\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert _load(tmp_path) == ["builds", "lorry_cpu.add_lora"]
    assert _load(tmp_path) == ["lorry_cpu.add_lora"]


def test_where_it_cannot_be_built_sampling_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FileNotFoundError(2, "No such file or directory", "c++")

    monkeypatch.setattr(kernel, "load_kernel", fail)
    with capture_logs() as logs:
        assert not kernel.has_kernel(wrap_model(tiny_qwen3()))
    assert [entry["why"] for entry in logs] == ["[Errno 2] No such file or directory: 'c++'"]
    with capture_logs() as logs:
        assert not kernel.has_kernel(wrap_model(tiny_qwen3().bfloat16())), "it is for float32"
    assert logs == []


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Where kernels were built, by a compiler that takes no time."""
    folders = list[Path]()

    def build(folder: Path) -> Path:
        folders.append(folder)
        library = folder / "lorry_cpu.so"
        library.write_bytes(b"another kernel")
        return library

    monkeypatch.setattr(kernel, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(kernel, "_build", build)
    return folders


def test_what_is_no_library_is_replaced(built: list[Path], tmp_path: Path) -> None:
    kernel.load_kernel.__wrapped__()
    (kept,) = (tmp_path / "lorry/kernels").iterdir()
    kept.write_bytes(b"")
    kernel.load_kernel.__wrapped__()
    assert kept.read_bytes() == b"another kernel" and len(built) == 2
    assert [kept] == list((tmp_path / "lorry/kernels").iterdir()), "nothing is left of where it was built"


def test_another_compiler_builds_another_kernel(
    built: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.load_kernel.__wrapped__()
    monkeypatch.setenv("CXX", "true")
    kernel.load_kernel.__wrapped__()
    assert len(list((tmp_path / "lorry/kernels").iterdir())) == 2


def test_a_folder_that_others_may_write_to_is_not_trusted(built: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "lorry/kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    kernel.load_kernel.__wrapped__()
    assert list(folder.iterdir()) == []
    assert tmp_path not in built[0].parents
