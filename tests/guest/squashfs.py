# SPDX-License-Identifier: MIT
"""Read-only images of files, uncompressed: decompressing costs more than reading where the CPU is emulated."""

import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.guest.failure import CannotStart


def build(target: Path, root: Path, files: Iterable[Path]) -> None:
    """Makes the squashfs `target` of just these files and directories, named relative to `root`.

    A file that vanishes or changes meanwhile is no error. The image comes into being complete or not at all.
    """
    names = b"".join(bytes(path) + b"\0" for path in files)
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    tar_command = ["tar", "-C", str(root), "--null", "--no-recursion", "--ignore-failed-read", "-T", "-", "-cf", "-"]
    pack_command = ["sqfstar", "-quiet", "-no-progress", "-noI", "-noD", "-noF", "-noX", str(partial)]
    try:
        tar = subprocess.Popen(tar_command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert tar.stdin is not None
        with subprocess.Popen(
            pack_command, stdin=tar.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as pack:
            assert tar.stdout is not None
            assert pack.stderr is not None
            tar.stdout.close()
            with tar.stdin:
                tar.stdin.write(names)
            errors = pack.stderr.read().decode(errors="replace")
        # 1 says: some file changed while it was read.
        if tar.wait() not in (0, 1) or pack.returncode != 0:
            raise CannotStart(f"the image {target.name} could not be made: {errors.strip() or 'tar failed'}")
    except FileNotFoundError as error:
        raise CannotStart(f"{error.filename} is missing: install squashfs-tools and tar (make setup)") from None
    partial.rename(target)
