# SPDX-License-Identifier: MIT
"""The udev rules, put where udev finds them, and taken away."""

from __future__ import annotations

import subprocess
from importlib import resources
from pathlib import Path

RULES_NAME = "63-storage-blksnap-ublk.rules"
DEFAULT_RUNTIME = "/run/blksnap-ublk"
_DIRECTORY = "etc/udev/rules.d"


def rules_text(runtime: Path = Path(DEFAULT_RUNTIME)) -> str:
    """The rules for a daemon with that runtime directory."""
    text = (resources.files(__package__) / RULES_NAME).read_text()
    return text.replace(DEFAULT_RUNTIME, str(runtime.absolute()))


def install_rules(root: Path = Path("/"), runtime: Path = Path(DEFAULT_RUNTIME)) -> Path:
    """Writes the rules below `root`; their path. The udev of this host reads them at once. Raises OSError."""
    path = root / _DIRECTORY / RULES_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_suffix(".writing")
    writing.write_text(rules_text(runtime))
    writing.chmod(0o644)
    writing.rename(path)
    _read_again(root)
    _apply(root, runtime)
    return path


def uninstall_rules(root: Path = Path("/")) -> Path | None:
    """Removes the rules; their path, None where there are none. Raises OSError."""
    path = root / _DIRECTORY / RULES_NAME
    if not path.exists():
        return None
    path.unlink()
    _read_again(root)
    return path


def rules_installed(root: Path = Path("/"), runtime: Path = Path(DEFAULT_RUNTIME)) -> bool:
    """Whether these very rules are there."""
    try:
        return (root / _DIRECTORY / RULES_NAME).read_text() == rules_text(runtime)
    except OSError:
        return False


def _read_again(root: Path) -> None:
    # It would notice by itself, with the next event, but looks only every few seconds.
    if root == Path("/") and (root / "run/udev/control").exists():
        subprocess.run(["udevadm", "control", "--reload"], stdin=subprocess.DEVNULL, capture_output=True, timeout=30)


def _apply(root: Path, runtime: Path) -> None:
    """Lets udev look once more at the devices that are served already."""
    if root != Path("/"):
        return
    for role in sorted((runtime / "udev").glob("*")):
        sysfs = Path("/sys/dev/block" if ":" in role.name else "/sys/block") / role.name
        for uevent in [sysfs / "uevent", *(path.parent / "uevent" for path in sorted(sysfs.glob("*/partition")))]:
            if uevent.exists():
                uevent.write_text("change")
