"""The folders that checkpoints lie in: which there are, and their deletion. What is in them is the actors' business."""

import shutil
from collections.abc import Collection
from pathlib import Path

from ..wire.ids import RunId
from .holding import deleting


def folders_below(root: Path) -> list[Path]:
    """All that lies where checkpoints lie, `RUN/KIND/NAME.SEQ`, and what is being written aside there."""
    return [folder for folder in root.glob("*/*/*") if folder.is_dir()]


def not_in_use(folders: Collection[Path], in_use: Collection[str]) -> list[Path]:
    """Those that nothing needs. Compared by their last three parts, for the data may have been moved since.

    What is being written aside is called as its folder will be, with a dot before it and more behind: it is needed as
    long as that is.
    """
    needed = {place_of(Path(folder)) for folder in in_use}
    return [folder for folder in folders if not (place_of(folder) in needed or _is_written_aside(folder, needed))]


def place_of(folder: Path) -> tuple[str, ...]:
    """`RUN/KIND/NAME.SEQ`, in parts."""
    return folder.parts[-3:]


def imported_folder(root: Path, run: RunId) -> Path:
    """Where what was made elsewhere lies: no command of a run saves to a place like it."""
    return root / run / "imported" / "adapter"


def _is_written_aside(folder: Path, needed: Collection[tuple[str, ...]]) -> bool:
    run, kind, name = place_of(folder)
    return name.startswith(".") and any(
        (run, kind) == target[:2] and name.startswith(f".{target[2]}.") for target in needed
    )


def delete_folder(root: Path, folder: Path) -> None:
    """Delete a checkpoint's folder, unless somebody copies it: then a later sweep does. Raises ValueError for one
    outside `root`: no row, however wrong, deletes more."""
    folder = folder.resolve()
    if root.resolve() not in folder.parents:
        raise ValueError(f"{folder} is not below {root}")
    with deleting(root.parent) as allowed:
        if allowed and folder.exists():
            shutil.rmtree(folder)
