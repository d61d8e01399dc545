# SPDX-License-Identifier: MIT
"""The number by which the kernel knows a device."""

from __future__ import annotations

import os
from typing import NamedTuple


class DeviceNumber(NamedTuple):
    """Major and minor number; equal to the tuple of the two. Major 0 is a file system without a block device."""

    major: int
    minor: int

    @classmethod
    def of(cls, dev: int) -> DeviceNumber:
        """From `st_dev` or `st_rdev`."""
        return cls(os.major(dev), os.minor(dev))

    @classmethod
    def parse(cls, text: str) -> DeviceNumber:
        """From `MAJOR:MINOR` as sysfs and mountinfo write it; raises ValueError."""
        major, minor = text.strip().split(":")
        return cls(int(major), int(minor))

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"
