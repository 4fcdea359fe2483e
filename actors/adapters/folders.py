"""Folders that are complete or absent: written aside, checksummed, fsynced, renamed; and verified before they are read.

Knows paths it is given, never who named them or where else they are recorded.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...wire.errors import CheckpointError

CHECKSUMS = "checksums.json"


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """What is recorded of a folder: the bytes of its files, and the SHA-256 of its list of checksums, in hex."""

    size_bytes: int
    sha256: str


@contextmanager
def written_aside(folder: Path) -> Generator[Path]:
    """A new folder beside `folder`, which takes its name once all is written; removed where writing fails."""
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        yield aside
        if folder.exists():
            former = aside.with_name(f"{aside.name}.former")
            folder.rename(former)
            aside.rename(folder)
            shutil.rmtree(former)
        else:
            aside.rename(folder)
        for parent in (folder.parent, *(parent.parent for parent in new_parents)):
            _fsync(parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def seal(folder: Path) -> FolderFacts:
    """Writes the checksums of all files and makes the folder durable."""
    files = sorted(folder.iterdir())
    write_json(folder / CHECKSUMS, {path.name: _sha256(path) for path in files})
    files.append(folder / CHECKSUMS)
    for path in (*files, folder):
        _fsync(path)
    return FolderFacts(sum(path.stat().st_size for path in files), _sha256(folder / CHECKSUMS))


def verify(folder: Path) -> None:
    """Raises CheckpointError where a file is missing, cannot be read or differs from its checksum."""
    for name, expected in read_json(folder / CHECKSUMS).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        try:
            found = _sha256(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if found != expected:
            raise CheckpointError(f"{path} has SHA-256 {found}, expected {expected}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, default=sorted) + "\n")  # PEFT's config holds sets


def read_json(path: Path) -> dict[str, Any]:
    try:
        content: object = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return cast("dict[str, Any]", content)
