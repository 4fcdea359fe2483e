"""A disk that forgets, when the power goes, whatever was not fsynced: contents, and names in folders."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("forgetful.cpp")


@dataclass(frozen=True, slots=True)
class Disk:
    """`root` is where processes write; `kept` what survives, by inode."""

    root: Path
    kept: Path
    library: Path

    @classmethod
    def made(cls, folder: Path) -> "Disk":
        """Raises CalledProcessError where there is no C++ compiler."""
        disk = cls(folder / "root", folder / "kept", folder / "forgetful.so")
        disk.root.mkdir()
        disk.kept.mkdir()
        command = ["c++", "-shared", "-fPIC", "-O1", "-o", str(disk.library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        return disk

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that writes to it."""
        names = {"FORGETFUL_ROOT": self.root, "FORGETFUL_KEPT": self.kept, "LD_PRELOAD": self.library}
        return {name: str(path) for name, path in names.items()}

    def after_a_power_cut(self, folder: Path) -> Path:
        """What is on the disk then, below `folder`: the names that were made durable, with what was, or nothing."""
        self._restore(self.root.stat().st_ino, folder)
        return folder

    def _restore(self, inode: int, to: Path) -> None:
        names = self.kept / f"{inode}.names"
        if names.exists():
            to.mkdir()
            for line in names.read_text().splitlines():
                number, _, name = line.partition(" ")
                self._restore(int(number), to / name)
        elif (self.kept / str(inode)).exists():
            shutil.copyfile(self.kept / str(inode), to)
        else:
            to.touch()
