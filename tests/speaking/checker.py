# SPDX-License-Identifier: MIT
"""Whether images of several devices show one instant, judged by what their sectors say and when writes ended.

* What had completed before the take began is there, or what was written over it.
* What was submitted after the take returned is not there.
* If write B is there, on whichever device, so is every write that had completed before B was submitted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.speaking.sectors import SECTOR, Spoken, hear
from tests.speaking.writers import Write, Writer

NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Instant:
    """A take: ns of the monotonic clock, read before it began and after it returned."""

    began: int
    returned: int


def now() -> Instant:
    """An instant after all writes that have completed; nobody may be writing."""
    moment = time.monotonic_ns()
    return Instant(moment, moment)


def complaints(instant: Instant, images: Sequence[bytes], writers: Sequence[Writer]) -> list[str]:
    """What is wrong with the images, one for each device in the order of their numbers; one line each."""
    wrong: list[str] = []
    held: list[dict[int, Spoken]] = []
    for device, content in enumerate(images):
        found, nonsense = hear(device, content)
        wrong += nonsense
        held.append(_known(device, found, writers, wrong))
    latest = max((said.submitted for found in held for said in found.values()), default=0)
    for device, found in enumerate(held):
        needed = _needed(device, len(images[device]) // SECTOR, max(instant.began, latest), writers)
        for sector, begun in enumerate(needed.tolist()):
            said = found.get(sector)
            ended = 0 if said is None else _completed(writers[said.writer].written[said.sequence])
            if ended < begun:
                wrong.append(_missing(device, sector, said, begun, instant))
        wrong += [
            f"device {device}: sector {sector} holds {_name(said)}, "
            f"submitted {said.submitted - instant.returned} ns after the take"
            for sector, said in found.items()
            if said.submitted > instant.returned
        ]
    return wrong


def _known(device: int, found: dict[int, Spoken], writers: Sequence[Writer], wrong: list[str]) -> dict[int, Spoken]:
    """Those that their writer remembers in the same way."""
    known = {}
    for sector, said in found.items():
        written = writers[said.writer].written if said.writer < len(writers) else []
        made = written[said.sequence] if said.sequence < len(written) else None
        if made is None or (made.device, made.submitted) != (device, said.submitted):
            wrong.append(f"device {device}: sector {sector} holds {_name(said)}, which nobody remembers")
        elif not made.first <= sector < made.first + made.count:
            wrong.append(f"device {device}: sector {sector} holds {_name(said)}, which was not for it")
        else:
            known[sector] = said
    return known


def _needed(device: int, sectors: int, moment: int, writers: Sequence[Writer]) -> npt.NDArray[np.int64]:
    """For each sector when the last of the writes that had completed before `moment` was submitted, 0 for none.

    The sector must hold that write, or one that had not completed by then.
    """
    needed = np.zeros(sectors, dtype=np.int64)
    for writer in writers:
        for made in list(writer.written):
            if made.device == device and _completed(made) < moment:
                part = needed[made.first : made.first + made.count]
                np.maximum(part, made.submitted, out=part)
    return needed


def _completed(made: Write) -> int:
    return NEVER if made.completed is None else made.completed


def _missing(device: int, sector: int, said: Spoken | None, begun: int, instant: Instant) -> str:
    what = "nothing" if said is None else _name(said)
    return (
        f"device {device}: sector {sector} holds {what}, but a later write to it, submitted {instant.began - begun} ns "
        "before the take began, had completed before the take or before another write that is there was submitted"
    )


def _name(said: Spoken) -> str:
    return f"write {said.sequence} of writer {said.writer}"
