# SPDX-License-Identifier: MIT
"""Writing a file so that it comes into being whole or not at all."""

import contextlib
import os
import stat
from collections.abc import Iterator


@contextlib.contextmanager
def replaced_file(path: str) -> Iterator[int]:
    """A descriptor to write what `path` shall hold: renamed to it at the end, removed when the block raises.

    What exists and is no regular file (a pipe, a terminal) is written directly. Raises OSError.
    """
    if _is_special(path):
        with open(path, "wb", buffering=0) as file:
            yield file.fileno()
        return
    unfinished = f"{path}.{os.getpid()}.part"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        os.rename(unfinished, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
        raise


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _is_special(path: str) -> bool:
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
