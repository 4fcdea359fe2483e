"""What runs is what was installed, wherever `lorry` is called: the working directory is nobody's code."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import psutil
import pytest

import lorry
from tests.conftest import MODEL, ROOT, Server, children_of, start_server
from tests.service.test_training import datum

LORRY = Path(sysconfig.get_path("scripts")) / "lorry"
FOLDERS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
"""Where each package's folder lies in the tree, by the name that it installs as."""


async def trains(server: Server) -> bool:
    async with lorry.connect(server.address, api_key=server.new_key("visitor")) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=2)
        return (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] > 0


async def test_modules_in_the_working_directory_are_not_imported(tmp_path: Path) -> None:
    folder, marker = tmp_path / "hostile", tmp_path / "was-imported"
    (folder / "lorry").mkdir(parents=True)
    for module in ("lorry/__init__.py", "torch.py", "msgpack.py"):
        (folder / module).write_text(f"open({str(marker)!r}, 'w')\nraise ImportError('from the working directory')\n")
    server = start_server(tmp_path / "data", "--http", "127.0.0.1:0", command=[str(LORRY)], folder=folder)
    try:
        assert await trains(server)
        assert not marker.exists()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, in which an older build has left files."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in set(FOLDERS.values()):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / file, tree)
    left = tree / "build/lib/lorry"
    left.mkdir(parents=True)
    for name in ("cli.py", "no_longer_there.py"):
        (left / name).write_text("raise ImportError('from an older build')\n")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tree / "wheels"), str(tree))
    (wheel,) = (tree / "wheels").glob("*.whl")
    return wheel


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that knows no other Lorry, and has its dependencies from the one of the tests."""
    folder = tmp_path_factory.mktemp("environment") / "fresh"
    venv.create(folder, symlinks=True)
    _pip("--python", str(folder / "bin/python"), "install", "--no-deps", "--no-index", str(wheel))
    dependencies = _packages(folder) / "dependencies.pth"
    dependencies.write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder


def _packages(environment: Path) -> Path:
    (packages,) = environment.glob("lib/python*/site-packages")
    return packages


def test_a_wheel_has_every_file_of_the_tree_and_none_of_an_older_build(wheel: Path) -> None:
    expected: dict[str, bytes] = {}
    for name, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                expected[f"{name.replace('.', '/')}/{file.relative_to(ROOT / folder)}"] = file.read_bytes()
    assert "lorry/actors/sampling/lora/lora_rows.cpp" in expected
    with ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if name.startswith("lorry/")}
    assert packed.keys() == expected.keys()
    assert packed == expected


def test_in_the_root_of_a_clone_what_is_installed_is_imported(fresh: Path) -> None:
    ask = [str(fresh / "bin/python"), "-c", "import lorry; print(lorry.__file__)"]
    told = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(told) == _packages(fresh) / "lorry/__init__.py"


async def test_what_is_installed_serves_from_the_root_of_a_clone(fresh: Path, tmp_path: Path) -> None:
    command = [str(fresh / "bin/lorry")]
    server = start_server(tmp_path / "data", "--http", "127.0.0.1:0", command=command, folder=ROOT)
    try:
        children = {role: psutil.Process(pid) for role, pid in children_of(server.process.pid).items()}
        assert children.keys() == {"broker", "actor", "gateway"}
        for child in children.values():
            assert child.cmdline()[0] == str(fresh / "bin/python")
            assert child.environ()["PYTHONSAFEPATH"] == "1"
            assert child.cwd() == str(ROOT)
        assert await trains(server)
    finally:
        server.stop()
