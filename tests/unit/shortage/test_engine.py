# SPDX-License-Identifier: MIT
"""The engine without memory, descriptors, threads: every constructor in turn, with the n-th such call failing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.engine.conftest import folder

__all__ = ["folder"]

SOURCE = Path(__file__).with_name("failing_calls.c")
ROOT = SOURCE.parents[3]
EXPECTED = 25
"""Objects and rings of the story ask for more than that many things."""


def preloaded(folder: Path) -> Path:
    """`failing_calls.c` as a shared library."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler to build what makes calls fail")
    library = folder / "failing_calls.so"
    command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer's library has these calls already")
def test_every_call_that_asks_for_something_fails_once(folder: Path) -> None:
    library = preloaded(folder)
    told = subprocess.run(
        [sys.executable, "-m", "tests.unit.shortage.engine_story", str(library), str(folder)],
        env={**os.environ, "LD_PRELOAD": str(library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    counted = re.search(r"(\d+) calls, (\d+) of", told.stdout)
    assert counted, told.stdout
    print(told.stdout)
    assert int(counted[2]) >= EXPECTED
