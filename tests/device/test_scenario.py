# SPDX-License-Identifier: MIT
"""The scenario of the demo, as a test, on smaller disks."""

import os

import pytest

from demo import scenario

SIZE = (64 if os.environ.get("BLKSNAP_GUEST") == "tcg" else 160) << 20


@pytest.mark.scenario
def test_everything_is_as_the_demo_promises() -> None:
    scenario.run(SIZE)
