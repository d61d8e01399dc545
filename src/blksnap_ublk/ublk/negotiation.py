# SPDX-License-Identifier: MIT
"""What to ask of the driver at ADD_DEV, and what to make of the flags that it returns. No I/O here.

The flags of a device stay for its whole life, over every restart and upgrade of its server. So all that might be wanted
is asked for at the beginning; what counts is what comes back.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass

from blksnap_ublk.ublk.features import ZERO_COPY, Features


class DataPath(enum.StrEnum):
    """How the bytes of a request travel."""

    AUTO = "auto"
    """Zero copy where the kernel grants it and the target can use it, otherwise the copy way."""
    ZERO_COPY = "zero-copy"
    """I/O of the target goes straight to and from the pages of a request."""
    COPY = "copy"
    """Data are copied between the request and memory of the server."""


class Recovery(enum.StrEnum):
    """What becomes of a device whose server has died."""

    OFF = "off"
    """It goes, and everything on it fails."""
    REISSUE = "reissue"
    """Requests wait for the next server, which gets those in flight once more."""
    FAIL = "fail"
    """Requests fail until the next server comes."""


_RECOVERY = {
    Recovery.OFF: Features(0),
    Recovery.REISSUE: Features.USER_RECOVERY | Features.USER_RECOVERY_REISSUE,
    Recovery.FAIL: Features.USER_RECOVERY | Features.USER_RECOVERY_FAIL_IO,
}


@dataclass(frozen=True)
class Wish:
    """What a device should be able to do."""

    data_path: DataPath = DataPath.AUTO
    recovery: Recovery = Recovery.REISSUE
    part_scan: bool = True
    """Whether the kernel looks for partitions at the start; before 7.0 it always does."""


def attempts(wish: Wish, possible: Features | None) -> list[Features]:
    """The flags to ask for, best first: a driver that refuses one set with EINVAL is asked for the next.

    `possible` is the answer of GET_FEATURES, None where the driver does not have that command.
    """
    least = Features.USER_COPY | Features.CMD_IOCTL_ENCODE | _RECOVERY[wish.recovery]
    comfort = Features.UPDATE_SIZE
    if wish.recovery is not Recovery.OFF:
        comfort |= Features.QUIESCE
    if not wish.part_scan:
        comfort |= Features.NO_AUTO_PART_SCAN
    zero_copy = Features(0) if wish.data_path is DataPath.COPY else ZERO_COPY
    sets = [least | comfort | zero_copy, least | zero_copy, least | comfort, least]
    if possible is not None:
        # without GET_FEATURES' own word on it a flag is not worth an attempt; the driver clears what it does not know
        sets = [flags & (possible | least) for flags in sets]
    return list(dict.fromkeys(sets))


def settle(wish: Wish, granted: Features, *, target_needs_copy: str | None = None) -> DataPath:
    """The data path of a device with `granted` flags. `target_needs_copy`: why its target cannot use zero copy.

    Raises OSError(EOPNOTSUPP) when the wish cannot be fulfilled; the text says why and what to do.
    """
    missing = _RECOVERY[wish.recovery] & ~granted
    if missing:
        raise _refused(f"recovery={wish.recovery.value!r} needs {_list(missing)}, which the kernel refused")
    no_zero_copy = target_needs_copy
    if no_zero_copy is None and ZERO_COPY not in granted:
        no_zero_copy = f"the kernel refused {_list(ZERO_COPY & ~granted)} (zero copy needs Linux 6.16 or later)"
    if wish.data_path is DataPath.ZERO_COPY and no_zero_copy is not None:
        raise _refused(f"data_path='zero-copy' is not possible: {no_zero_copy}; use 'auto' or 'copy'")
    if wish.data_path is not DataPath.COPY and no_zero_copy is None:
        return DataPath.ZERO_COPY
    if Features.USER_COPY not in granted:
        raise _refused("the kernel refused USER_COPY; ublk of Linux 6.5 or later is needed")
    return DataPath.COPY


def _list(flags: Features) -> str:
    return " and ".join(flags.names())


def _refused(text: str) -> OSError:
    return OSError(errno.EOPNOTSUPP, text)
