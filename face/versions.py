"""What is installed, by its metadata: nothing of it is imported for that."""

import platform
from importlib.metadata import PackageNotFoundError, version

import typer


def print_versions(wanted: bool) -> None:
    """What a report of a mistake should have in it; ends the command where it is `wanted`."""
    if not wanted:
        return
    print(f"lorry {installed('lorry')}")
    others = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "tinker"))
    print(f"Python {platform.python_version()}, {others}")
    raise typer.Exit


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
