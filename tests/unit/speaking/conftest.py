# SPDX-License-Identifier: MIT
from __future__ import annotations

import os

import pytest

from blksnap_ublk.engine.sim import set_mutant
from tests.unit.engine.conftest import folder

__all__ = ["folder"]


@pytest.fixture(autouse=True, scope="session")
def seeded_bug() -> None:
    """BSU_MUTANT=N: all tests run with that seeded bug of csrc/core/mutant.h."""
    number = int(os.environ.get("BSU_MUTANT", "0"))
    if number:
        set_mutant(number)
