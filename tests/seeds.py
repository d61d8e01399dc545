# SPDX-License-Identifier: MIT
"""Chance that can be repeated: `BSU_SEED=…` gives a test the numbers that it had in the run that failed."""

from __future__ import annotations

import os
import random


def dice() -> random.Random:
    """Numbers from a seed that is printed, so that a failure shows it."""
    seed = int(os.environ.get("BSU_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"BSU_SEED={seed}")
    return random.Random(seed)
