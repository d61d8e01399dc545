# SPDX-License-Identifier: MIT
"""The loop server of the kernel's own selftests: what ublk costs where a server does nothing but pass requests on."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.build_kublk import PROGRAM, WHY_NOT
from bench.contenders.contender import Unavailable

LIMIT = 60.0
OPTIONS = {"zero-copy": ("--auto_zc",), "copy": ("--user_copy",), "mapped": ()}
"""By data way; `mapped`: the kernel copies all data to and from buffers of the server."""
DEVICE = re.compile(r"^dev id (\d+):", re.MULTILINE)


@contextmanager
def kublk(disk: str, way: str, *, depth: int = 128) -> Iterator[str]:
    """The path of a ublk device on `disk`, with one queue. Raises Unavailable."""
    if not PROGRAM.exists():
        reason = WHY_NOT.read_text().strip() if WHY_NOT.exists() else "it was not built: see bench/build_kublk.py"
        raise Unavailable(reason)
    done = _kublk("add", "-t", "loop", "-q", "1", "-d", str(depth), *OPTIONS[way], disk)
    found = DEVICE.search(done)
    if found is None:
        raise Unavailable(f"kublk made no device: {done.strip()[-200:] or 'it said nothing'}")
    try:
        path = f"/dev/ublkb{found[1]}"
        if not Path(path).is_block_device():
            raise Unavailable(f"kublk's device {path} does not exist")
        yield path
    finally:
        _kublk("del", "-n", found[1])


def _kublk(*arguments: str) -> str:
    done = subprocess.run(
        [str(PROGRAM), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    return done.stdout
