# SPDX-License-Identifier: MIT
"""What a keeper writes down for the one that comes after it: who lives, and how often io has died of late."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from blksnap_ublk.keeper.adoption import spare_of
from blksnap_ublk.keeper.identity import Identity
from blksnap_ublk.keeper.processes import Member, ProcessesFile, Record
from blksnap_ublk.keeper.role import Role

DEATHS_WITHIN = 60.0
"""Seconds within which so many deaths of io, as the configuration says, call for a lifeboat."""


class Living:
    """The processes of `roles` and this one, in the file at `path`; written from `own` to `disown`.

    `lifeboat_after`: deaths of io, 0 for never. `managed`: a service manager starts a keeper that died again.
    """

    def __init__(self, path: Path, roles: Mapping[str, Role], lifeboat_after: int, *, managed: bool) -> None:
        """Raises OSError."""
        self._file = ProcessesFile(path)
        self._roles = roles
        self._lifeboat_after = lifeboat_after
        self._record = Record(managed=managed)
        self._owned = False
        self._held_back = False

    def former(self) -> Record:
        """What another keeper wrote; the deaths that it has seen count on."""
        former = self._file.read()
        self._record.io_deaths = former.io_deaths
        return former

    def own(self) -> None:
        """This process is the keeper from now on; nothing is written yet."""
        self._owned = True

    def disown(self) -> None:
        """Another one is."""
        self._owned = False

    def write(self) -> None:
        """Write down who lives now."""
        if not self._owned or self._held_back:
            return
        this = Identity.of()
        self._record.processes = {"keeper": Member(this.pid, this.started)}
        for name, role in self._roles.items():
            if role.active is not None:
                self._record.processes[name] = role.active
            if role.spare is not None:
                self._record.processes[spare_of(name)] = role.spare
        self._file.write(self._record)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Several roles change: whoever looks, or comes after a death amidst of it, finds all of it or nothing."""
        self._held_back = True
        try:
            yield
        finally:
            self._held_back = False
            self.write()

    def io_died(self) -> None:
        """The active io process has died unexpectedly."""
        self._record.io_deaths = [*self._recent_deaths(), time.monotonic()]

    def is_lifeboat_due(self) -> bool:
        """Whether the next io process has to be a lifeboat."""
        return 0 < self._lifeboat_after <= len(self._recent_deaths())

    def clear(self) -> None:
        """The daemon has ended, and the state files stay: nobody lives."""
        self._file.write(Record())

    def remove(self) -> None:
        """Remove the file and end its use."""
        self._file.remove()
        self._file.close()

    def close(self) -> None:
        """End the use of the file. May be called again."""
        self._file.close()

    def _recent_deaths(self) -> list[float]:
        now = time.monotonic()
        return [each for each in self._record.io_deaths if 0 <= now - each < DEATHS_WITHIN]
