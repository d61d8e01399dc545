# SPDX-License-Identifier: MIT
"""Descriptors of many kinds, as somebody could send them with a message."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

KINDS = ("empty", "page", "mebibyte", "holes", "read-only", "directory", "null", "pipe", "other end")


@contextmanager
def descriptors(folder: Path) -> Iterator[dict[str, int]]:
    """One of each of KINDS, files in `folder`; all closed at the end."""
    with ExitStack() as stack:
        opened: dict[str, int] = {}

        def add(kind: str, descriptor: int) -> None:
            stack.callback(os.close, descriptor)
            opened[kind] = descriptor

        for kind, size in (("empty", 0), ("page", 4096), ("mebibyte", 1 << 20), ("holes", 1 << 20)):
            add(kind, os.open(folder / kind, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            if kind == "holes":
                os.ftruncate(opened[kind], size)
            elif size:
                os.posix_fallocate(opened[kind], 0, size)
        add("read-only", os.open(folder / "mebibyte", os.O_RDONLY | os.O_CLOEXEC))
        add("directory", os.open(folder, os.O_RDONLY | os.O_CLOEXEC))
        add("null", os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        hear, say = os.pipe2(os.O_CLOEXEC)
        add("pipe", hear)
        add("other end", say)
        yield opened
