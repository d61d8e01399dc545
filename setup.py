# SPDX-License-Identifier: MIT
"""What pyproject.toml cannot say: the C sources are built by csrc/Makefile, and cffi links the result."""

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "src" / "blksnap_ublk" / "engine"))
import build


class BuildEngine(build_ext):
    """Builds the archive of the C sources before the extension that it is linked into."""

    def run(self) -> None:
        command = ["make", "--no-print-directory", "-C", "csrc", f"OUT={build.ARCHIVE.parent}"]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit("the C sources do not build; the compiler's errors stand above")
        super().run()


setup(cmdclass={"build_ext": BuildEngine}, cffi_modules=["src/blksnap_ublk/engine/build.py:ffibuilder"])
