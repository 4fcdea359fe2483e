"""What runs is what was installed, wherever `lorry` is called: the working directory is nobody's code."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
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
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the packages are made of, and of what lies beside them."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in {*FOLDERS.values(), "docs", "examples"}:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, tree)
    shutil.copytree(ROOT / "tests/packaging", tree / "tests/packaging")  # which is not to be packed
    shutil.copy2(ROOT / "tests/conftest.py", tree / "tests/test_none.py")
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """Built where an older build has left files."""
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


class Built(NamedTuple):
    sdist: Path
    wheel: Path
    said: str


@pytest.fixture(scope="module")
def built(tree: Path, wheel: Path) -> Built:
    """As `make wheel` does: a source archive of the tree, and a wheel of the archive."""
    (tree / "build").rename(tree.parent / "out-of-the-way")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (sdist,), (wheel,) = (tree / "dist").glob("*.tar.gz"), (tree / "dist").glob("*.whl")
    return Built(sdist, wheel, ended.stdout + ended.stderr)


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


def test_a_build_warns_of_nothing(built: Built) -> None:
    """But that tests are not in the archive, which they are not to be."""
    warned = [line for line in built.said.splitlines() if "warning" in line.lower() or "deprecat" in line.lower()]
    assert set(warned) <= {"warning: no previously-included files found matching 'tests/*.py'"}


def test_a_source_archive_has_what_is_installed_and_what_tells_of_it_and_builds_the_same_wheel(
    built: Built, wheel: Path
) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        content = {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}  # pyright: ignore
    tops = {name.partition("/")[0] for name in names if "/" in name}
    assert tops == {folder.partition("/")[0] for folder in FOLDERS.values()} | {"docs", "examples", "lorry.egg-info"}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "examples/grpo.py", "docs/design.md"} <= names
    for folder in ("bench/", "tests/"):
        expected = tuple(f"{place}/" for place in FOLDERS.values() if place.startswith(folder))
        files = {name for name in names if name.startswith(folder) and "." in name}
        assert {name for name in files if not name.startswith(expected)} == set()
    for places in (str(ROOT), str(built.sdist.parent.parent)):
        assert [name for name, data in content.items() if places.encode() in data] == []
    assert packed(built.wheel) == packed(wheel)


def packed(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_outside_a_clone_the_command_tells_what_it_is(fresh: Path, tmp_path: Path) -> None:
    def told(*words: str) -> str:
        ask = [str(fresh / "bin/lorry"), *words]
        return subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert told("--version").startswith(f"lorry {version('lorry')}\n")
    assert "demo" in told("--help")


def test_outside_a_clone_the_demo_runs_to_its_bill(fresh: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [str(fresh / "bin/lorry"), "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "alice's adapter" in ended.stdout and "bob's adapter" in ended.stdout
    lines = [line for line in ended.stdout.splitlines() if line.startswith("│")]
    assert {(tenant, kind) for tenant in ("alice", "bob") for kind in ("train", "sample")} <= {
        (cells[1].strip(), cells[3].strip()) for cells in (line.split("│") for line in lines)
    }
    assert "lorry serve --demo" in ended.stdout


def test_bash_completes_what_was_begun(fresh: Path) -> None:
    """As the function asks that `lorry --install-completion` writes."""
    show = [str(fresh / "bin/lorry"), "--show-completion", "bash"]
    script = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    assert "_LORRY_COMPLETE=complete_bash" in script

    def completed(line: str) -> list[str]:
        asked = {"_LORRY_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        ask = [str(fresh / "bin/lorry")]
        return subprocess.run(ask, env=os.environ | asked, capture_output=True, text=True, check=True).stdout.split()

    assert completed("lorry ser") == ["serve"]
    assert completed("lorry serve --heart") == ["--heartbeat-s"]


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
