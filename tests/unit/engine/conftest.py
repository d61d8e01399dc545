# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk import engine
from blksnap_ublk.engine.sim import set_mutant


@pytest.fixture(autouse=True, scope="session")
def seeded_bug() -> None:
    """BSU_MUTANT=N: all tests run with that seeded bug of csrc/core/mutant.h."""
    if number := int(os.environ.get("BSU_MUTANT", "0")):
        set_mutant(number)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory where direct I/O works (not on every tmpfs)."""
    for place in (tempfile.gettempdir(), "/var/tmp"):
        with tempfile.TemporaryDirectory(prefix="blksnap-test-", dir=place) as path:
            if has_direct_io(Path(path)):
                yield Path(path)
                return
    pytest.skip(f"no direct I/O in {tempfile.gettempdir()} and /var/tmp")


def has_direct_io(path: Path) -> bool:
    probe = path / "probe"
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


@pytest.fixture
def thread() -> Iterator[engine.Thread]:
    with engine.Thread() as thread:
        yield thread
