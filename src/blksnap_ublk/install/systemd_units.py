# SPDX-License-Identifier: MIT
"""The units by which systemd runs the daemon, put where it finds them, and taken away.

What they have to do: our children outlive a death of the keeper; the daemon is not stopped before what uses its
devices, but then in good order; devices can be attached at boot.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DEFAULT_RUNTIME = "/run/blksnap-ublk"
SAVED = "/var/lib/blksnap-ublk"
"""Where change maps are saved over a reboot."""

DAEMON = "blksnap-ublk.service"
SHUTDOWN = "blksnap-ublk-shutdown.service"
ATTACH = "blksnap-ublk-attach@.service"
_ENABLED = {DAEMON: "multi-user.target.wants", SHUTDOWN: "final.target.wants"}
_DIRECTORY = "etc/systemd/system"

PRESERVES_DESCRIPTORS = 254
"""The first version with FileDescriptorStorePreserve= …"""

SURVIVES_SHUTDOWN = 255
"""… and SurviveFinalKillSignal=."""

_DAEMON = """\
# SPDX-License-Identifier: MIT
[Unit]
Description=Snapshots and change tracking of block devices
# It has to end after all that uses its devices, and these are more than systemd can know: so a shutdown does not stop
# it (no Conflicts=shutdown.target), nor does rescue mode. {shutdown} stops it when everything is unmounted.
DefaultDependencies=no
IgnoreOnIsolate=yes
After={after}
StartLimitIntervalSec=0
{unit_extra}
[Service]
Type=notify
NotifyAccess=all
{environment}ExecStart={python} -P -m blksnap_ublk.daemon.main --foreground
# Another version takes over while devices are in use.
ExecReload={python} -P -m blksnap_ublk.cli.main serve --takeover
# Only the keeper is ended and started again: the processes that serve go on without it and are found by the next one.
KillMode=process
SendSIGKILL=no
Restart=on-failure
RestartSec=0
OOMPolicy=continue
OOMScoreAdjust=-1000
WatchdogSec=60
TimeoutStartSec=5min
TimeoutStopSec=5min
# Storage files that have no name live as long as a descriptor of them.
FileDescriptorStoreMax=16384
{service_extra}{runtime_directory}LimitMEMLOCK=infinity
LimitNOFILE=1048576
# A core dump may go to a device that waits for the process that is dumped; 1 forbids it to files and to pipes.
LimitCORE=1
TasksMax=infinity

[Install]
WantedBy=multi-user.target
"""

_SHUTDOWN = """\
# SPDX-License-Identifier: MIT
[Unit]
Description=End of snapshots and change tracking, after all file systems are unmounted
DefaultDependencies=no
After=umount.target
Before=final.target

[Service]
Type=oneshot
ExecStart={systemctl} stop {daemon}
TimeoutStartSec=5min

[Install]
WantedBy=final.target
"""

_ATTACH = """\
# SPDX-License-Identifier: MIT
# systemctl enable blksnap-ublk-attach@$(systemd-escape -p /dev/disk/by-id/…).service
# For a file system on it, in fstab: x-systemd.requires=blksnap-ublk-attach@….service
[Unit]
Description=Filtered device of %f
DefaultDependencies=no
Wants={daemon}
Requires=%i.device
After={daemon} %i.device
# Change maps are saved there when it is detached, before that is unmounted.
RequiresMountsFor={saved}
Conflicts=shutdown.target
Before=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
{environment}ExecStart={python} -P -m blksnap_ublk.cli.main attach %f
ExecStop={python} -P -m blksnap_ublk.cli.main detach %f

[Install]
WantedBy=multi-user.target
"""

_STATE = """\
# SPDX-License-Identifier: MIT
# The daemon mounts it and takes it away.
[Unit]
DefaultDependencies=no
"""


def unit_texts(runtime: Path = Path(DEFAULT_RUNTIME), *, version: int, python: Path | None = None) -> dict[str, str]:
    """The files, by their path below the directory of units, for a daemon with that runtime directory.

    `version` is systemd's; what an older one does not know is left out. `python` runs this package.
    """
    python = Path(sys.executable) if python is None else python
    elsewhere = f"Environment={_quoted(f'BLKSNAP_UBLK_RUN={runtime}')}\n"
    words = {
        "after": " ".join(["systemd-udevd.service", "systemd-modules-load.service", *_mounts_beneath(python)]),
        "daemon": DAEMON,
        "environment": "" if str(runtime) == DEFAULT_RUNTIME else elsewhere,
        "python": _quoted(str(python)),
        "runtime_directory": _runtime_directory(runtime),
        "saved": SAVED,
        "service_extra": "FileDescriptorStorePreserve=yes\n" if version >= PRESERVES_DESCRIPTORS else "",
        "shutdown": SHUTDOWN,
        "systemctl": shutil.which("systemctl") or "/usr/bin/systemctl",
        "unit_extra": "SurviveFinalKillSignal=yes\n" if version >= SURVIVES_SHUTDOWN else "",
    }
    return {
        DAEMON: _DAEMON.format(**words),
        SHUTDOWN: _SHUTDOWN.format(**words),
        ATTACH: _ATTACH.format(**words),
        f"{escaped_path(runtime / 'state')}.mount.d/blksnap-ublk.conf": _STATE,
    }


def install_units(root: Path = Path("/"), runtime: Path = Path(DEFAULT_RUNTIME)) -> list[Path]:
    """Writes the units below `root` and enables them, all but that for attaching; their paths. Nothing is started.

    The systemd of this host reads them at once. Raises OSError.
    """
    directory = root / _DIRECTORY
    texts = unit_texts(runtime, version=systemd_version())
    for name, text in texts.items():
        _write(directory / name, text)
    for name, wants in _ENABLED.items():
        link = directory / wants / name
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(f"/{_DIRECTORY}/{name}")
    _read_again(root)
    return [directory / name for name in texts]


def uninstall_units(root: Path = Path("/"), runtime: Path = Path(DEFAULT_RUNTIME)) -> list[Path]:
    """Removes the units; the paths of those that were there. A daemon that runs goes on. Raises OSError."""
    directory = root / _DIRECTORY
    removed = [directory / name for name in unit_texts(runtime, version=0) if (directory / name).exists()]
    for name, wants in _ENABLED.items():
        (directory / wants / name).unlink(missing_ok=True)
    for path in removed:
        path.unlink()
    for parent in {directory / wants for wants in _ENABLED.values()} | {path.parent for path in removed} - {directory}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
    _read_again(root)
    return removed


def units_installed(root: Path = Path("/"), runtime: Path = Path(DEFAULT_RUNTIME)) -> bool | None:
    """Whether these very units are there; None: none at all."""
    directory = root / _DIRECTORY
    if not (directory / DAEMON).exists():
        return None
    texts = unit_texts(runtime, version=systemd_version())
    links = [directory / wants / name for name, wants in _ENABLED.items()]
    try:
        same = all((directory / name).read_text() == text for name, text in texts.items())
    except OSError:
        return False
    return same and all(link.is_symlink() for link in links)


def systemd_version() -> int:
    """The version of this host's systemd; 0 where there is none."""
    try:
        done = subprocess.run(["systemctl", "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError:
        return 0
    match = re.match(r"systemd (\d+)", done.stdout)
    return int(match[1]) if match else 0


def escaped_path(path: Path) -> str:
    """A path as the name of a unit, as `systemd-escape --path` does it."""
    text = "/".join(part for part in str(path).split("/") if part)
    if not text:
        return "-"
    return "".join(_escaped(text))


def _escaped(text: str) -> Iterator[str]:
    for position, byte in enumerate(os.fsencode(text)):
        char = chr(byte)
        if char == "/":
            yield "-"
        elif char.isascii() and (char.isalnum() or char in ":_" or (char == "." and position)):
            yield char
        else:
            yield f"\\x{byte:02x}"


def _quoted(text: str) -> str:
    """As one word of a unit file."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if re.search(r"[\s'\"]", text) else text


def _runtime_directory(runtime: Path) -> str:
    if runtime.parent != Path("/run"):
        return ""
    return f"RuntimeDirectory={runtime.name}\nRuntimeDirectoryMode=0700\nRuntimeDirectoryPreserve=yes\n"


def _mounts_beneath(python: Path) -> list[str]:
    """The mounts that hold our programs, other than the root: the daemon starts after them.

    After them only: what is required by a mount is stopped with it.
    """
    places = {_mount_point(path) for path in (python, Path(sys.prefix), Path(__file__))}
    return [f"{escaped_path(place)}.mount" for place in sorted(places) if place != Path("/")]


def _mount_point(path: Path) -> Path:
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.is_mount() or place == Path("/"))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(path.name + ".writing")
    writing.write_text(text)
    writing.chmod(0o644)
    writing.rename(path)


def _read_again(root: Path) -> None:
    if root == Path("/") and (root / "run/systemd/system").is_dir():
        command = ["systemctl", "daemon-reload"]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
