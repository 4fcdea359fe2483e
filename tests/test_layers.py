"""The arrows between the packages, and between the rooms inside them, point one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HARNESS = "bench/harness"
FACE = "face"
"""Its folder is named so that it hides nothing: it installs as `lorry` itself."""
PACKAGES = {
    "wire": set[str](),
    "storage": {"wire"},
    "scheduler": {"wire", "storage"},
    "actors": {"wire"},
    "client": {"wire"},
    "gateway": {"wire", "client"},
}
ROOMS = {
    "actors.images": set[str](),
    "actors.model": {"actors.images"},
    "actors.adapters": {"actors.model"},
    "actors.export": {"actors.model", "actors.adapters"},
    "actors.training": {"actors.images", "actors.model", "actors.adapters"},
    "actors.sampling": {"actors.images", "actors.model", "actors.sampling.lora"},
    "actors.sampling.lora": {"actors.model"},
    "actors.group": {"actors.images", "actors.model", "actors.training", "actors.sampling"},
    "scheduler.planning": set[str](),
    "scheduler.access": {"scheduler.planning"},
    "scheduler.observing": set(),
    "gateway.tinker": {"gateway"},
    "gateway.chat": {"gateway"},
    "gateway.openai": {"gateway", "gateway.chat"},
    "gateway.anthropic": {"gateway", "gateway.chat"},
    "gateway.console": {"gateway", "gateway.chat", "gateway.tinker"},
}
"""What of its own package a room may import: other rooms, or the hall, by their names."""
UNSEEN = {"gateway.app"}
"""The hall's modules that put the rooms together, so that no room may know them."""
DOES_IO = {"socket", "sqlite3", "asyncio", "anyio", "pathlib", "os", "time", "zmq", "subprocess", "shutil", "structlog"}


def modules(*packages: str) -> Iterator[tuple[str, Path]]:
    """Dotted names below `lorry`, and files."""
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), file


NAMES = {name for name, _ in modules(*PACKAGES)}


def imported(name: str, file: Path) -> set[str]:
    """The modules of ours that a module imports, by their dotted names below `lorry`."""
    found: set[str] = set()
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            origin = ".".join(part for part in start if part)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lorry":
            origin = (node.module or "").removeprefix("lorry").removeprefix(".")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "lorry"}
            continue
        else:
            continue
        inner = {f"{origin}.{alias.name}".lstrip(".") for alias in node.names}
        found |= (inner & NAMES) or {origin}
    return found


def room_of(module: str) -> str:
    """The innermost room that a module lies in, or its package."""
    return max((r for r in (*ROOMS, *PACKAGES) if module == r or module.startswith(f"{r}.")), key=len, default=module)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    for name, file in modules(package):
        others = {module.partition(".")[0] for module in imported(name, file)} - {package}
        assert others <= PACKAGES[package], file.relative_to(ROOT)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_that_it_may(room: str) -> None:
    package = room.partition(".")[0]
    for name, file in modules(package):
        if room_of(name) == room:
            mine = {module for module in imported(name, file) if module.partition(".")[0] == package}
            assert {room_of(module) for module in mine} - {room} <= ROOMS[room], file.relative_to(ROOT)
            assert not mine & UNSEEN, file.relative_to(ROOT)


@pytest.mark.parametrize("hall", ["gateway"])
def test_a_hall_knows_its_rooms_only_where_they_are_put_together(hall: str) -> None:
    for name, file in modules(hall):
        if room_of(name) == hall and name not in UNSEEN:
            assert {room_of(module) for module in imported(name, file)} & ROOMS.keys() == set(), name


def test_every_folder_is_a_room_that_is_installed() -> None:
    folders = {name for name, file in modules(*PACKAGES) if file.name == "__init__.py"}
    assert folders == PACKAGES.keys() | ROOMS.keys()
    listed = (ROOT / "pyproject.toml").read_text()
    assert {name for name in folders if f'"lorry.{name}"' not in listed} == set()


def test_what_decides_what_runs_next_does_no_io() -> None:
    for name, file in modules("scheduler"):
        if room_of(name) == "scheduler.planning":
            assert_does_no_io(file)


def assert_does_no_io(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not {n.partition(".")[0] for n in names} & DOES_IO, file.relative_to(ROOT)


def test_what_a_benchmark_sends_and_says_is_decided_without_io() -> None:
    """It installs as `lorry.bench`, above all others: it serves, and is a client, as a user is."""
    for name in ("workload", "arrivals", "requests", "figures", "compare", "sweep", "recording", "device"):
        assert_does_no_io(ROOT / HARNESS / f"{name}.py")
    for package in PACKAGES:
        for name, file in modules(package):
            assert not any(module.startswith("bench") for module in imported(name, file)), name


def test_no_file_has_more_than_four_hundred_lines() -> None:
    files = [file for package in (*PACKAGES, FACE, HARNESS) for file in (ROOT / package).rglob("*.py")]
    assert {file.name for file in files if len(file.read_text().splitlines()) > 400} == set()


def test_no_folder_hides_what_is_installed() -> None:
    """Python looks into the working directory first: a clone's root must not offer a `lorry` of its own."""
    assert not (ROOT / "lorry").exists() and not (ROOT / "lorry.py").exists()
