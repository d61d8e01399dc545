# SPDX-License-Identifier: MIT
"""What this host can do for us, and what stands in the way: one finding for each thing looked at."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

from blksnap_ublk.forms import Finding, FindingState
from blksnap_ublk.host.kernel import OLDEST, ZERO_COPY, KernelVersion, traps_of
from blksnap_ublk.host.left_over import LeftOvers, left_over_findings
from blksnap_ublk.host.udev import Udev
from blksnap_ublk.install import lvm_filter, systemd_units, udev_rules

OK, WARN, FAIL = FindingState.OK, FindingState.WARN, FindingState.FAIL

_USER_COPY = 1 << 7
_ZERO_COPY_SET = 1 << 0 | 1 << 11  # SUPPORT_ZERO_COPY, AUTO_BUF_REG
_RECOVERY = 1 << 3 | 1 << 4  # USER_RECOVERY, USER_RECOVERY_REISSUE
_CAPABILITIES = {"CAP_IPC_LOCK": 14, "CAP_SYS_ADMIN": 21, "CAP_SYS_RESOURCE": 24}
_MEMORY_WANTED = 256 << 20


def examine(
    features: int | None,
    left_over: LeftOvers | None = None,
    *,
    root: Path = Path("/"),
    release: str | None = None,
    runtime: Path = Path(udev_rules.DEFAULT_RUNTIME),
) -> list[Finding]:
    """All findings, the most basic first.

    `features` is the answer of GET_FEATURES, None where it could not be asked; `left_over`: what was found left over,
    None where nobody looked. `root` is where `/proc`, `/dev` … are looked for, `release` stands for `uname -r`;
    `runtime` is the runtime directory of the daemon.
    """
    release = os.uname().release if release is None else release
    return [
        *kernel_findings(release),
        driver_finding(root, release),
        features_finding(features),
        capabilities_finding(root),
        memlock_finding(*resource.getrlimit(resource.RLIMIT_MEMLOCK)),
        io_uring_finding(root),
        memory_finding(root),
        *([] if left_over is None else left_over_findings(left_over)),
        udev_finding(root, runtime),
        lvm_finding(root),
        systemd_finding(root, runtime),
    ]


def kernel_findings(release: str) -> list[Finding]:
    """The version, and one warning for each known trap of it."""
    try:
        version = KernelVersion.parse(release)
    except ValueError as error:
        return [_finding("kernel", WARN, str(error), None)]
    if version < OLDEST:
        text = f"{release} is too old: ublk devices can be served from {OLDEST} on"
        return [_finding("kernel", FAIL, text, "boot a newer kernel, such as the one of the backports")]
    if version < ZERO_COPY:
        text = f"{release}: data is copied; zero copy comes with {ZERO_COPY}"
        first = _finding("kernel", OK, text, None)
    else:
        first = _finding("kernel", OK, f"{release}: zero copy is possible", None)
    return [first] + [_finding("kernel-trap", WARN, trap.text, trap.advice) for trap in traps_of(version)]


def driver_finding(root: Path, release: str) -> Finding:
    """Whether ublk_drv is there and shows its control node."""
    if (root / "dev/ublk-control").exists():
        return _finding("ublk", OK, "/dev/ublk-control is there", None)
    if (root / "sys/module/ublk_drv").exists():
        return _finding(
            "ublk",
            FAIL,
            "ublk_drv is loaded, but /dev/ublk-control is missing",
            "mount a devtmpfs on /dev, or run udev",
        )
    modules = _read(root / f"lib/modules/{release}/modules.dep") or ""
    if "ublk_drv.ko" in modules:
        return _finding("ublk", FAIL, "the module ublk_drv is not loaded", "modprobe ublk_drv")
    return _finding(
        "ublk", FAIL, f"this kernel ({release}) has no module ublk_drv",
        "install the rest of its modules (Ubuntu: linux-modules-extra), or a kernel with CONFIG_BLK_DEV_UBLK",
    )  # fmt: skip


def features_finding(features: int | None) -> Finding:
    """What the driver grants."""
    if features is None:
        return _finding("features", FAIL, "the driver could not be asked", "load ublk_drv and run this as root")
    shown = f"features {features:#x}"
    if not features & _USER_COPY:
        return _finding("features", FAIL, f"{shown}: no USER_COPY", f"boot kernel {OLDEST} or later")
    if features & _RECOVERY != _RECOVERY:
        return _finding("features", FAIL, f"{shown}: no USER_RECOVERY_REISSUE", f"boot kernel {OLDEST} or later")
    if features & _ZERO_COPY_SET != _ZERO_COPY_SET:
        return _finding("features", OK, f"{shown}: data is copied", None)
    return _finding("features", OK, f"{shown}: zero copy", None)


def capabilities_finding(root: Path) -> Finding:
    """Whether this process may do what the daemon has to."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", _read(root / "proc/self/status") or "", re.MULTILINE)
    held = int(match[1], 16) if match else 0
    missing = [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]
    if missing:
        return _finding("capabilities", FAIL, f"missing: {', '.join(missing)}", "run it as root, outside of containers")
    return _finding("capabilities", OK, f"has {', '.join(_CAPABILITIES)}", None)


def memlock_finding(soft: int, hard: int) -> Finding:
    """RLIMIT_MEMLOCK; CAP_IPC_LOCK, which root has, goes beyond it."""
    if resource.RLIM_INFINITY in (soft, hard) or hard >= _MEMORY_WANTED:
        return _finding("memlock", OK, "memory can be locked", None)
    return _finding(
        "memlock", WARN, f"at most {hard} bytes may be locked without CAP_IPC_LOCK", "ulimit -l unlimited, as root"
    )


def io_uring_finding(root: Path) -> Finding:
    """Whether io_uring is allowed."""
    value = _read(root / "proc/sys/kernel/io_uring_disabled")
    advice = "sysctl kernel.io_uring_disabled=0"
    if value == "2":
        return _finding("io_uring", FAIL, "is forbidden for everybody", advice)
    if value == "1":
        return _finding("io_uring", OK, "is allowed for root and one group", None)
    return _finding("io_uring", OK, "is allowed", None)


def memory_finding(root: Path) -> Finding:
    """Available memory: maps and buffers are locked."""
    match = re.search(r"^MemAvailable:\s*([0-9]+) kB", _read(root / "proc/meminfo") or "", re.MULTILINE)
    if match is None:
        return _finding("memory", WARN, "/proc/meminfo does not tell what is available", None)
    available = int(match[1]) * 1024
    text = f"{available >> 20} MiB available"
    if available < _MEMORY_WANTED:
        return _finding("memory", WARN, text, f"free some: at least {_MEMORY_WANTED >> 20} MiB are advised")
    return _finding("memory", OK, text, None)


def udev_finding(root: Path, runtime: Path) -> Finding:
    """Whether udev runs, and whether it has our rules."""
    if not (root / "run/udev/control").exists():
        return _finding("udev", OK, "does not run: there are only the links in /dev/blksnap", None)
    advice = "blksnap-ublk install udev, or blksnap-ublk doctor --fix"
    rules = Udev(root).rules(udev_rules.RULES_NAME)
    if rules is None:
        text = "does not know our devices: links in /dev/disk lead to origins, or to images"
        return _finding("udev", WARN, text, advice)
    if rules != udev_rules.rules_text(runtime):
        text = f"its rules for our devices are those of another version, or of a daemon in another place than {runtime}"
        return _finding("udev", WARN, text, advice)
    return _finding("udev", OK, "runs, and knows our devices", None)


def lvm_finding(root: Path) -> Finding:
    """Whether LVM would meet the same physical volume on origin, filtered device and image."""
    if not lvm_filter.lvm_installed(root):
        return _finding("lvm", OK, "is not installed", None)
    settings = lvm_filter.lvm_settings(root)
    if settings.uses_devices_file:
        text = "uses only the devices that its devices file lists"
        advice = "for a volume group on a filtered device: lvmdevices --adddev /dev/blksnap/NAME, --deldev its origin"
        return _finding("lvm", OK, text, advice)
    if settings.filters_ours:
        return _finding("lvm", OK, "its filter leaves out origins and images", None)
    text = "would find the same physical volumes on origins, filtered devices and images"
    if settings.filter_file is not None:
        advice = f'in {settings.filter_file}: put "{lvm_filter.PATTERN}" first in global_filter'
    else:
        advice = "blksnap-ublk install lvm, or blksnap-ublk doctor --fix"
    return _finding("lvm", WARN, text, advice)


def systemd_finding(root: Path, runtime: Path) -> Finding:
    """Whether systemd runs the daemon, if there is one, and as this version wants it."""
    if not (root / "run/systemd/system").is_dir():
        return _finding("systemd", OK, "does not run: the daemon looks after itself", None)
    installed = systemd_units.units_installed(root, runtime)
    if installed is None:
        text = "does not run the daemon: commands start it, and nothing attaches devices at boot"
        return _finding("systemd", OK, text, "where it is to: blksnap-ublk install systemd")
    if not installed:
        advice = "blksnap-ublk install systemd, or blksnap-ublk doctor --fix"
        return _finding("systemd", WARN, "its units for the daemon are not those of this version", advice)
    return _finding("systemd", OK, "runs the daemon", None)


def _finding(name: str, state: FindingState, text: str, advice: str | None) -> Finding:
    return Finding(name=name, state=state, text=text, advice=advice)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
