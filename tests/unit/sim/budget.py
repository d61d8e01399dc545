# SPDX-License-Identifier: MIT
"""How long the tests of chance may take, in seconds of processor time: half a minute, or what BSU_SOAK_SECONDS says."""

from __future__ import annotations

import os

SEEDED = "BSU_MUTANT" in os.environ
"""With a seeded bug a part of the usual time must do, and it is enough to know that there is a failure."""

SOAK_SECONDS = int(os.environ.get("BSU_SOAK_SECONDS", "0"))

EXAMPLES = 100 if SEEDED else max(300, SOAK_SECONDS * 10)
"""Of the state machine: about 20 in a second, and half of the time is the dice's."""

STEPS = 60

DICE_SECONDS = 5.0 if SEEDED else SOAK_SECONDS / 2 or 15.0
