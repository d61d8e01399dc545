# SPDX-License-Identifier: MIT
"""kill -9 of the processes of a test's daemon, and what must be so again afterwards."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from functools import partial

from blksnap_ublk.errors import BlksnapError
from blksnap_ublk.forms import DeviceState
from tests.own_daemon import OwnDaemon, wait_until

SPARES = ("io-spare", "control-spare")
EVERYBODY = ("keeper", "io", "control", *SPARES)


def runs(daemon: OwnDaemon, role: str, former: int | None) -> bool:
    """Whether a process other than `former` has that role and lives."""
    try:
        member = daemon.processes().living(role)
    except (OSError, ValueError):
        return False  # it is being written for the first time
    return member is not None and member.pid != former


def kill(daemon: OwnDaemon, *roles: str) -> dict[str, int]:
    """kill -9 of all of them at once, but those that nobody is at the moment; returns their pids, ended."""
    record = daemon.processes()
    victims = {role: member for role in roles if (member := record.living(role)) is not None}
    for member in victims.values():
        with suppress(ProcessLookupError):
            os.kill(member.pid, signal.SIGKILL)
    wait_until("who was killed has ended", lambda: not any(member.alive for member in victims.values()))
    return {role: member.pid for role, member in victims.items()}


def start_where_nobody_lives(daemon: OwnDaemon) -> None:
    """As whoever uses the command line does."""
    record = daemon.processes()
    if record.living("keeper") is None and record.living("control") is None:
        daemon.cli("list")


def kill_and_wait(daemon: OwnDaemon, *roles: str) -> None:
    """The same, and returns when others have their places and the daemon answers."""
    former = kill(daemon, *roles)
    if set(EVERYBODY) - set(SPARES) <= set(roles):
        daemon.start()
    for role in set(roles) - set(SPARES):
        wait_until(f"another {role} process runs", partial(runs, daemon, role, former.get(role)))
    wait_until("the daemon answers", lambda: answers(daemon))


def answers(daemon: OwnDaemon) -> bool:
    """Whether it can be asked and ended, and all its devices are served."""
    if daemon.processes().living("keeper") is None:
        return False  # control starts another one
    try:
        with daemon.client() as client:
            return all(device.state is DeviceState.LIVE for device in client.list_devices())
    except BlksnapError:
        return False
