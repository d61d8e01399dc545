# SPDX-License-Identifier: MIT
"""Many long lives, by the roll of a die. A failure names its seed: BSU_SEED=… runs that life alone."""

from __future__ import annotations

import os
import random
import time

from tests.unit.sim.budget import DICE_SECONDS
from tests.unit.sim.dice import play

LENGTHS = (30, 150, 150, 1000)


def live(seed: int) -> int:
    """One life; returns its steps."""
    steps = LENGTHS[seed % len(LENGTHS)]
    try:
        play(seed, steps)
    except AssertionError as reason:
        raise AssertionError(f"{reason}\nagain: BSU_SEED={seed} pytest tests/unit/sim/test_dice.py") from reason
    return steps


def test_lives() -> None:
    if "BSU_SEED" in os.environ:
        live(int(os.environ["BSU_SEED"]))
        return
    seeds = random.Random()
    begin = time.process_time()
    steps = lives = 0
    while (seconds := time.process_time() - begin) < DICE_SECONDS:
        steps += live(seeds.randrange(1 << 32))
        lives += 1
    print(f"{lives} lives of {steps} steps, {steps / seconds:.0f} steps a second of processor time")
