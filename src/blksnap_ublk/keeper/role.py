# SPDX-License-Identifier: MIT
"""One role of the daemon, io or control: the process that is active in it, and its spare.

When the active process dies, the spare takes the role at once. Only one that dies quickly again and again has to wait.
"""

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from blksnap_ublk.keeper.child import ALIVE, READY, STANDS_BY, TURN, TURN_AS_LIFEBOAT
from blksnap_ublk.keeper.process import Process, Start, exit_text
from blksnap_ublk.keeper.processes import Member
from blksnap_ublk.rpc.loop import Loop, Timer

log = logging.getLogger(__name__)

QUICK_DEATH = 2.0
"""One that was active for less than this many seconds died quickly."""

RESTART_DELAYS = (0.0, 0.0, 0.25, 0.5, 1.0)
"""Seconds until the next one is active after so many quick deaths in a row …"""

LAST_DELAY = 5.0
"""… and after more than these. Also the time between two attempts to start what cannot be started."""

SPARE_DELAY = 1.0
"""Seconds until there is another spare: what the former one has to do now goes first."""


@dataclass
class RoleEvents:
    """What a role calls back.

    `changed()` after each change of its processes; `ready()` once, when an active one serves for the first time;
    `failed(code, text)` when one cannot serve before that; `died()` when the active one died unexpectedly;
    `ended(status)` once, when after `stop`, `kill` or `expect_end` none is left, with the last status of an active one.
    """

    changed: Callable[[], None]
    ready: Callable[[], None]
    failed: Callable[[int, str], None]
    ended: Callable[[int | None], None]
    died: Callable[[], None] = field(default=lambda: None)


class Role:
    """Two processes that are started with `start`."""

    def __init__(self, loop: Loop, name: str, start: Start, events: RoleEvents) -> None:
        self._loop = loop
        self.name = name
        self.start_with = start
        self._events = events
        self._active: Process | None = None
        self._spare: Process | None = None
        self._spare_stands_by = False
        self.lifeboat: Callable[[], bool] = lambda: False
        """Whether the process whose turn it is has to be a lifeboat."""
        self._on_stand_by: Callable[[], None] | None = None
        self._began = 0.0
        self._heard: float | None = None
        self._quick_deaths = 0
        self._timers: dict[Callable[[], None], Timer] = {}
        self._serves = False
        self._tolerant = False
        self._ending = False
        self._over = False
        self._status: int | None = None
        self._last_words: tuple[int, str] | None = None
        self._successor: Callable[[], None] | None = None

    @property
    def active(self) -> Member | None:
        """The process in the role."""
        return None if self._active is None else self._active.member

    @property
    def spare(self) -> Member | None:
        """The process that waits for its turn."""
        return None if self._spare is None else self._spare.member

    def is_silent(self, seconds: float) -> bool:
        """Whether an active process that has given signs of life gave none for so long, and nobody has stopped it."""
        if self._heard is None or self._active is None or time.monotonic() - self._heard < seconds:
            return False
        if self._active.member.stopped:
            self._heard = time.monotonic()
            return False
        return True

    # ---- beginning ----

    def start(self) -> None:
        """Start it for the first time. A failure is reported by the event `failed`."""
        if self._active is None:
            self._activate()

    def adopt(self, active: Process | None, spare: Process | None) -> None:
        """Go on with what another keeper started; a spare of ours that is there already stays.

        What has died meanwhile is started by `start`, and again and again where that fails.
        """
        self._tolerant = True
        if active is not None:
            self._active = active
            active.said = lambda line: self._said(active, line)
            active.exited = lambda status: self._exited(active, status)
            # The keeper before may have died between the record and the word. One that has been told ignores it.
            active.signal(TURN_AS_LIFEBOAT if self.lifeboat() else TURN)
            self._began = time.monotonic()
            self._became_ready()
        if spare is not None:
            self._take_spare(spare)
        self._later(SPARE_DELAY, self._make_spare)
        self._events.changed()

    def prepare(self, on_stand_by: Callable[[], None]) -> None:
        """Start a spare although none is active; `on_stand_by` is called when it stands by. Raises OSError."""
        self._on_stand_by = on_stand_by
        self._take_spare(Process.spawn(self._loop, self.start_with))

    # ---- end ----

    def expect_end(self) -> None:
        """Let the active one end by itself, and start none again; the spare ends now."""
        self._ending = True
        for timer in self._timers.values():
            timer.cancel()
        if self._spare is not None:
            self._spare.signal(signal.SIGKILL)
        self._end_if_over()

    def stop(self) -> None:
        """SIGTERM, and none is started again."""
        self.signal(signal.SIGTERM)
        self.expect_end()

    def kill(self) -> None:
        """SIGKILL, and none is started again."""
        self.signal(signal.SIGKILL)
        self.expect_end()

    def kill_spare(self) -> None:
        """SIGKILL for the spare, whose place stays empty; the active one goes on."""
        for timer in self._timers.values():
            timer.cancel()
        if self._spare is not None:
            self._spare.signal(signal.SIGKILL)
            self._spare.forget()
            self._spare = None

    def forget(self) -> None:
        """Look after the active one no longer; it goes on, for another keeper."""
        self._ending = self._over = True
        for timer in self._timers.values():
            timer.cancel()
        if self._active is not None:
            self._active.forget()
            self._active = None

    def signal(self, number: int) -> None:
        """Send the active one a signal."""
        if self._active is not None:
            self._active.signal(number)

    def replace(self, number: int, then: Callable[[], None]) -> None:
        """Let the active one end by signal `number`; its end is no death, and the next one waits for `start`.

        `then` is called when it has ended; at once when there is none.
        """
        if self._active is None:
            then()
        else:
            self._successor = then
            self._active.signal(number)

    # ---- the active process ----

    def _activate(self) -> None:
        if self._spare is None:
            try:
                self._take_spare(Process.spawn(self._loop, self.start_with))
            except OSError as error:
                self._failed(1, f"the {self.name} process cannot be started: {error}")
                self._later(LAST_DELAY, self._activate)
                return
        process, self._spare = self._spare, None
        assert process is not None
        self._active = process
        self._last_words = None
        self._began = time.monotonic()
        lifeboat = self.lifeboat()
        # In the record first: one that is active and that no other keeper would find could never be replaced.
        self._events.changed()
        process.signal(TURN_AS_LIFEBOAT if lifeboat else TURN)
        if lifeboat:
            log.error("%s process %d takes over as a lifeboat", self.name, process.member.pid)
        elif self._serves:
            log.info("%s process %d takes over", self.name, process.member.pid)
        if self._serves:
            self._later(SPARE_DELAY, self._make_spare)

    def _said(self, process: Process, line: str) -> None:
        if line == STANDS_BY:
            if process is self._spare:
                self._spare_stands_by = True
                if self._on_stand_by is not None:
                    then, self._on_stand_by = self._on_stand_by, None
                    then()
        elif line == ALIVE:
            if process is self._active:
                self._heard = time.monotonic()
        elif line == READY:
            log.info("%s process %d serves", self.name, process.member.pid)
            self._became_ready()
        else:
            code, _, text = line.partition(" ")
            self._last_words = int(code) if code.isdecimal() else 1, text
            log.error("%s process %d: %s", self.name, process.member.pid, text)

    def _became_ready(self) -> None:
        if not self._serves:
            self._serves = True
            self._later(SPARE_DELAY, self._make_spare)
            self._events.ready()

    def _exited(self, process: Process, status: int | None) -> None:
        if process is self._spare:
            self._spare = None
            self._spare_exited(process, status)
        elif process is self._active:
            self._active = None
            self._heard = None
            self._status = status
            self._active_exited(process, status)
        self._events.changed()
        self._end_if_over()

    def _active_exited(self, process: Process, status: int | None) -> None:
        if self._successor is not None:
            then, self._successor = self._successor, None
            self._serves = False
            then()
        elif self._ending:
            pass
        elif not self._serves and not self._tolerant:
            code, text = self._last_words or (1, f"the {self.name} process ended at its start ({exit_text(status)})")
            self._failed(code, text)
        else:
            self._events.died()
            quick = time.monotonic() - self._began < QUICK_DEATH
            self._quick_deaths = self._quick_deaths + 1 if quick else 0
            settled = self._quick_deaths >= len(RESTART_DELAYS)
            delay = LAST_DELAY if settled else RESTART_DELAYS[self._quick_deaths]
            text = f"the next one takes over in {delay:g} s" if delay else "the next one takes over"
            log.error("%s process %d died (%s); %s", self.name, process.member.pid, exit_text(status), text)
            if not self._serves and self._last_words:
                self._failed(*self._last_words)
            self._cancel(self._make_spare)
            if delay:
                self._later(delay, self._activate)
            else:
                self._activate()

    def _failed(self, code: int, text: str) -> None:
        if self._serves:
            log.error("%s", text)
            return
        if not self._tolerant:
            self._ending = True
        self._events.failed(code, text)

    # ---- the spare ----

    def _make_spare(self) -> None:
        if self._spare is not None or self._ending:
            return
        try:
            self._take_spare(Process.spawn(self._loop, self.start_with))
        except OSError as error:
            log.error("no spare for the %s process can be started: %s", self.name, error)
            self._later(LAST_DELAY, self._make_spare)
        self._events.changed()

    def _take_spare(self, process: Process) -> None:
        self._spare = process
        self._spare_stands_by = False
        process.said = lambda line: self._said(process, line)
        process.exited = lambda status: self._exited(process, status)

    def _spare_exited(self, process: Process, status: int | None) -> None:
        if self._ending:
            return
        text = exit_text(status)
        if self._last_words is not None:
            text = self._last_words[1]
        log.error("the spare %d for the %s process ended (%s)", process.member.pid, self.name, text)
        if self._active is None and not self._serves and not self._tolerant:
            self._failed(*(self._last_words or (1, f"the {self.name} process ended at its start ({text})")))
            return
        # One that stood by may have been killed; one that did not will not stand by the next time either.
        self._later(SPARE_DELAY if self._spare_stands_by else LAST_DELAY, self._make_spare)

    # ---- helpers ----

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        if not self._ending:
            self._cancel(call)
            self._timers[call] = self._loop.later(seconds, call)

    def _cancel(self, call: Callable[[], None]) -> None:
        timer = self._timers.pop(call, None)
        if timer is not None:
            timer.cancel()

    def _end_if_over(self) -> None:
        if self._ending and not self._over and self._active is None and self._spare is None:
            self._over = True
            self._events.ended(self._status)
