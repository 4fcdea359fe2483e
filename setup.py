"""What pyproject.toml cannot say: a wheel has what the tree has, and nothing that an earlier build left in `build/`."""

import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class FreshBuild(build_py):
    """setuptools packs all of `build/lib`, and copies into it only files that are newer than those it finds there."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(cmdclass={"build_py": FreshBuild})
