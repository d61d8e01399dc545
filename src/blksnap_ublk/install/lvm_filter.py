# SPDX-License-Identifier: MIT
"""The filter that keeps LVM from meeting a physical volume on an origin and on images besides the filtered device.

LVM compares all paths of a device, so one line that names the links of origins and images is right for all that are
attached later. It goes to `lvmlocal.conf`, whose settings replace those of `lvm.conf`: not where the administrator has
a `global_filter` of his own.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

PATTERN = "r|^/dev/blksnap/.*/.*|"
CONFIGURATION = "etc/lvm/lvm.conf"
LOCAL = "etc/lvm/lvmlocal.conf"

_BEGIN = "# begin of what blksnap-ublk has added\n"
_END = "# end of what blksnap-ublk has added\n"
_BLOCK = (
    f"{_BEGIN}"
    "# Origins and images hold the same physical volumes as the filtered device: only that one is to be used.\n"
    f'devices {{\n\tglobal_filter = [ "{PATTERN}" ]\n}}\n'
    f"{_END}"
)
_FILTER = re.compile(r"(?:^|[\s{/])global_filter\s*=\s*(\[(?:\"[^\"]*\"|[^\]\"])*\]|\"[^\"]*\")")
_DEVICES_FILE = re.compile(r"(?:^|[\s{/])use_devicesfile\s*=\s*1")


@dataclass(frozen=True)
class LvmSettings:
    """What the configuration says. `filter_file`: the file whose `global_filter` is in force, if there is one."""

    filter_file: Path | None
    filters_ours: bool
    uses_devices_file: bool


def lvm_installed(root: Path = Path("/")) -> bool:
    """Whether there is an LVM to be configured."""
    return (root / CONFIGURATION).exists() and any((root / place / "lvm").exists() for place in ("sbin", "usr/sbin"))


def lvm_settings(root: Path = Path("/")) -> LvmSettings:
    """Reads the configuration below `root`; a file that is not there says nothing."""
    filter_file, filters_ours, devices_file = None, False, False
    for name in (CONFIGURATION, LOCAL):
        text = _active(root / name)
        devices_file = devices_file or _DEVICES_FILE.search(text) is not None
        if found := _FILTER.findall(text):
            filter_file, filters_ours = root / name, "/dev/blksnap/" in found[-1]
    return LvmSettings(filter_file, filters_ours, devices_file)


def install_filter(root: Path = Path("/")) -> Path:
    """Adds the filter to `lvmlocal.conf`; its path. Nothing changes where it is there already.

    Raises OSError; ValueError, which says what to add, where a `global_filter` of somebody else is in force.
    """
    settings = lvm_settings(root)
    path = root / LOCAL
    if settings.filters_ours:
        return settings.filter_file or path
    if settings.filter_file is not None:
        raise ValueError(f'{settings.filter_file}: has a global_filter; put "{PATTERN}" first in it')
    text = path.read_text() if path.exists() else ""
    _replace(path, text + ("" if not text or text.endswith("\n") else "\n") + _BLOCK)
    return path


def uninstall_filter(root: Path = Path("/")) -> Path | None:
    """Takes out what was added; the path of the file, None where nothing was. Raises OSError."""
    path = root / LOCAL
    text = path.read_text() if path.exists() else ""
    start, end = text.find(_BEGIN), text.find(_END)
    if start < 0 or end < start:
        return None
    _replace(path, text[:start] + text[end + len(_END) :])
    return path


def _active(path: Path) -> str:
    """A file's text without its comments."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_suffix(".writing")
    with writing.open("w") as file:
        file.write(text)
        os.fchmod(file.fileno(), path.stat().st_mode & 0o7777 if path.exists() else 0o644)
    writing.rename(path)
