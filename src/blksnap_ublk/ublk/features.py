# SPDX-License-Identifier: MIT
"""The features of the ublk driver (`UBLK_F_*`)."""

from __future__ import annotations

import enum


class Features(enum.IntFlag, boundary=enum.KEEP):
    """Feature bits of a device or of the driver. What ADD_DEV returns counts, never what was asked for."""

    SUPPORT_ZERO_COPY = 1 << 0
    URING_CMD_COMP_IN_TASK = 1 << 1
    NEED_GET_DATA = 1 << 2
    USER_RECOVERY = 1 << 3
    USER_RECOVERY_REISSUE = 1 << 4
    UNPRIVILEGED_DEV = 1 << 5
    CMD_IOCTL_ENCODE = 1 << 6
    USER_COPY = 1 << 7
    ZONED = 1 << 8
    USER_RECOVERY_FAIL_IO = 1 << 9
    UPDATE_SIZE = 1 << 10
    AUTO_BUF_REG = 1 << 11
    QUIESCE = 1 << 12
    PER_IO_DAEMON = 1 << 13
    BUF_REG_OFF_DAEMON = 1 << 14
    BATCH_IO = 1 << 15
    INTEGRITY = 1 << 16
    SAFE_STOP_DEV = 1 << 17
    NO_AUTO_PART_SCAN = 1 << 18
    SHMEM_ZC = 1 << 19
    IO_DESC_SIZE = 1 << 20

    def names(self) -> list[str]:
        """The names of the bits that are set; `bit N` for those of a later kernel."""
        bits = [1 << n for n in range(64) if self & (1 << n)]
        return [Features(bit).name or f"bit {bit.bit_length() - 1}" for bit in bits]


ZERO_COPY = Features.AUTO_BUF_REG | Features.SUPPORT_ZERO_COPY
"""Both are needed for I/O straight from the pages of a request: the first does it, the second repairs its failures."""

ALL_FEATURES = Features((1 << 64) - 1)
