"""The folders that checkpoints lie in: their deletion. What is in them is the actors' business."""

import shutil
from pathlib import Path


def delete_folder(root: Path, folder: Path) -> None:
    """Delete a checkpoint's folder. Raises ValueError for one outside `root`: no row, however wrong, deletes more."""
    folder = folder.resolve()
    if root.resolve() not in folder.parents:
        raise ValueError(f"{folder} is not below {root}")
    if folder.exists():
        shutil.rmtree(folder)
