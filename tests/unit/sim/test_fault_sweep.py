# SPDX-License-Identifier: MIT
"""The first, the second … the n-th I/O of each kind fails, until a run meets no fault. The same with map memory."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from blksnap_ublk.engine import ImageStatus
from tests.unit.sim.ending import end
from tests.unit.sim.scenarios import SCENARIOS, Scenario
from tests.unit.sim.script import Fate, Fault, Kind, Shortage
from tests.unit.sim.world import World

FATES = [
    (Fate.ERROR, errno.EIO),
    (Fate.ERROR, errno.ENOSPC),
    (Fate.ERROR, errno.EAGAIN),
    (Fate.ERROR_AFTER_DATA_MOVED, errno.EIO),
    (Fate.SHORT, 0),
    (Fate.NOTHING_DONE, 0),
    (Fate.SILENT, 0),
]
MENDED = {(Fate.ERROR, errno.EAGAIN), (Fate.SHORT, 0)}
"""What goes on until it is done: nobody may notice it."""

BREAKING = {Kind.COPY_WRITE, Kind.IMAGE_FROM_STORAGE}


def play(scenario: Scenario, fault: Fault | None, *, early: bool) -> None:
    """The whole story and its end; nothing may break but for a reason."""
    world = World(replace(scenario.shape, early=early))
    scenario.story(world, fault)
    broken = [held for held in world.held if held.image.status[0] is not ImageStatus.ACTIVE]
    harmless = not fault or not fault.met or (fault.fate, fault.error) in MENDED
    if harmless and not scenario.overflows:
        assert not broken
    if fault and fault.met and not harmless and fault.kind not in BREAKING and fault.fate is not Fate.SILENT:
        assert scenario.overflows or not broken, f"{fault.kind.value} breaks an image"
    end(world)


@pytest.mark.parametrize("early", [False, True], ids=["", "early"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=[scenario.name for scenario in SCENARIOS])
def test_every_io_fails_once(scenario: Scenario, early: bool) -> None:
    play(scenario, None, early=early)
    for kind in Kind:
        for fate, error in FATES:
            number = 1
            while True:
                fault = Fault(kind, number, fate, error)
                try:
                    play(scenario, fault, early=early)
                except AssertionError as reason:
                    raise AssertionError(f"with {fault}: {reason}") from reason
                if not fault.met:
                    break
                number += 1


@pytest.mark.parametrize("fed", [True, False], ids=["added later", "never added"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=[scenario.name for scenario in SCENARIOS])
def test_map_memory_ends_anywhere(scenario: Scenario, fed: bool) -> None:
    pages = 0
    met = True
    while met:
        world = World(scenario.shape)
        world.starve(pages)
        shortage = Shortage(fed)
        scenario.story(world, shortage)
        met = shortage.met
        if fed and not scenario.overflows:
            assert all(held.image.status[0] is ImageStatus.ACTIVE for held in world.held)
        end(world)
        pages += 1
    assert pages > 1
