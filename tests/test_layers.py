"""The arrows between the packages point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "wire": set[str](),
    "storage": {"wire"},
    "scheduler": {"wire", "storage"},
    "actors": {"wire"},
    "client": {"wire"},
    "gateway": {"wire", "client"},
}


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level >= 2:
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorry"):
            found.add((node.module or "").removeprefix("lorry").strip(".").partition(".")[0] or "lorry")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("lorry")}
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    for file in sorted((ROOT / package).glob("*.py")):
        assert imported(file) <= ALLOWED[package], file.relative_to(ROOT)


def test_no_file_has_more_than_four_hundred_lines() -> None:
    files = [file for package in (*ALLOWED, "lorry") for file in (ROOT / package).glob("*.py")]
    assert {file.name for file in files if len(file.read_text().splitlines()) > 400} == set()
