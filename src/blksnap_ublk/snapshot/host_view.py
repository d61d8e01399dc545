# SPDX-License-Identifier: MIT
"""Paths as the host means them.

Our mount namespace follows the host's where the host's mounts are shared. Where they are not, what was mounted since
our start is seen only through the root directory of the first process.
"""

from __future__ import annotations

import os

_HOST = "/proc/1/root"


def find(path: str) -> str:
    """The path under which this process finds what the host calls `path`, or, for a file to be made, its directory."""
    directory = path if os.path.lexists(path) or os.path.lexists(_HOST + path) else os.path.dirname(path)
    try:
        outside = os.stat(_HOST + directory)
    except OSError:
        return path
    try:
        same = os.path.samestat(os.stat(directory), outside)
    except OSError:
        same = False
    return path if same else _HOST + path


def name(text: str) -> str:
    """A text with such paths as the host writes them."""
    return text.replace(_HOST + "/", "/")
