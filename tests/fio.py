# SPDX-License-Identifier: MIT
"""fio with verification, as a check that a device returns what was written to it."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def fio_verify(path: str, *options: str, size: str = "24m", seed: int = 1, limit: float = 300) -> None:
    """Random writes of mixed sizes, then all of them read and checked. Skips where there is no fio.

    `limit`: seconds that it may take.
    """
    if shutil.which("fio") is None:
        pytest.skip("no fio")
    command = [
        *("fio", "--name=verify", f"--filename={path}", "--ioengine=psync", "--thread", "--direct=1", "--rw=randwrite"),
        *("--bsrange=4k-256k", f"--size={size}", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1"),
        *(f"--randseed={seed}", "--group_reporting", "--verify_state_save=0", *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
