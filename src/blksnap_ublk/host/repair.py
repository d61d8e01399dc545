# SPDX-License-Identifier: MIT
"""What `doctor` has found, put right where that can be done without asking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from blksnap_ublk.errors import BlksnapError, from_os_error
from blksnap_ublk.forms import Finding, FindingState
from blksnap_ublk.install import Installable, install, udev_rules

LEFT_OVER = ("left-over", "storage-files")
"""The findings that `take_away` is for."""


def fix(
    findings: Sequence[Finding],
    *,
    take_away: Callable[[], Sequence[str]] | None = None,
    root: Path = Path("/"),
    runtime: Path = Path(udev_rules.DEFAULT_RUNTIME),
) -> list[str]:
    """Puts right what `doctor.examine` complains about; a line for each thing done, or tried and not possible.

    udev rules, the filter of LVM and units are installed below `root`, for a daemon with the runtime directory
    `runtime`. `take_away` removes what is left over and in nobody's use, and returns a line for each thing.
    """
    wrong = {finding.name for finding in findings if finding.state is not FindingState.OK}
    done = [_installed(kind, root, runtime) for kind in Installable if kind.value in wrong]
    if take_away is not None and wrong & set(LEFT_OVER):
        try:
            done += take_away()
        except (BlksnapError, OSError) as error:
            done.append(f"{LEFT_OVER[0]}: {error}")
    return done


def _installed(kind: Installable, root: Path, runtime: Path) -> str:
    try:
        return f"{kind.value}: wrote {', '.join(str(path) for path in install(kind, root, runtime))}"
    except BlksnapError as error:
        return f"{kind.value}: not done: {error}"
    except OSError as error:
        return f"{kind.value}: not done: {from_os_error(error)}"
