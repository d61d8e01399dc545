# SPDX-License-Identifier: MIT
"""What `doctor` has found, put right where that can be done without asking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from blksnap_ublk.errors import BlksnapError, from_os_error
from blksnap_ublk.forms import Finding, FindingState
from blksnap_ublk.install import Installable, install, udev_rules


def fix(
    findings: Sequence[Finding],
    *,
    delete_dead: Callable[[], Sequence[str]] | None = None,
    root: Path = Path("/"),
    runtime: Path = Path(udev_rules.DEFAULT_RUNTIME),
) -> list[str]:
    """Puts right what `doctor.examine` complains about; a line for each thing done, or tried and not possible.

    udev rules and the filter of LVM are installed below `root`, for a daemon with the runtime directory `runtime`.
    `delete_dead` deletes ublk devices of ours that have no disk and no server, and returns their paths.
    """
    wrong = {finding.name for finding in findings if finding.state is not FindingState.OK}
    done = [_installed(kind, root, runtime) for kind in Installable if kind.value in wrong]
    if "left-over" in wrong and delete_dead is not None:
        try:
            done += [f"left-over: deleted {path}" for path in delete_dead()]
        except (BlksnapError, OSError) as error:
            done.append(f"left-over: not deleted: {error}")
    return done


def _installed(kind: Installable, root: Path, runtime: Path) -> str:
    try:
        return f"{kind.value}: wrote {install(kind, root, runtime)}"
    except BlksnapError as error:
        return f"{kind.value}: not done: {error}"
    except OSError as error:
        return f"{kind.value}: not done: {from_os_error(error)}"
