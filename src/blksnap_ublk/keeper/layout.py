# SPDX-License-Identifier: MIT
"""The version of all that lies in the state directory, so that a program which cannot read it never takes it over."""

import os
from pathlib import Path

LAYOUT = 5
"""Grows with every change after which an older program misreads the state files, or this one those of an older."""


class OtherLayout(Exception):
    """The state is of a layout that this program cannot read; the text says which."""


def write_layout(path: Path) -> None:
    """Note down at `path` that the state is of our layout. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        text = f"{LAYOUT}\n".encode()
        if os.pwrite(descriptor, text, 0) == len(text):
            os.ftruncate(descriptor, len(text))
    finally:
        os.close(descriptor)


def check_layout(path: Path) -> None:
    """Raises OtherLayout when the state is not, or not known to be, of our layout."""
    try:
        found = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OtherLayout(f"the layout of the state is not known ({error})") from None
    if found != str(LAYOUT):
        raise OtherLayout(f"the state is of layout {found[:20]!r}, this version reads layout {LAYOUT}")
